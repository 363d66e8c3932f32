"""The model card of an export: what the Hub reads, and whose card stays."""

from contextlib import nullcontext

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig

from lit_ft.models import Packaged, Pretrained, add_adapter, export_model
from lit_ft.models import base as base_module
from lit_ft.models.base import Base, base_at, base_of, name_of_folder
from lit_ft.models.export.card import write_cards

LORA = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
OWN = "---\nlicense: [not: yaml\n---\n# Mine\n"


def adapted(folder):
    return add_adapter(Pretrained(str(folder)).load_model(torch.float32), LORA)


@pytest.mark.parametrize("merge", [True, False])
def test_each_folder_has_one_card_and_none_names_the_machine(folder, tmp_path, merge):
    export_model(adapted(folder), None, tmp_path / "out", merge=merge)
    place = tmp_path / "out" / "adapter" if merge else tmp_path / "out"
    found = sorted((tmp_path / "out").rglob("README.md"))
    assert found == sorted({tmp_path / "out" / "README.md", place / "README.md"})
    card = ModelCard.load(place / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-generation")
    assert {"lora", "lit_ft"} <= set(card.data.tags)
    assert card.data.base_model is None  # a folder is no name on the Hub
    assert str(tmp_path) not in str(card)
    assert "[More Information Needed]" not in card.text
    if merge:
        assert ModelCard.load(tmp_path / "out" / "README.md").data.library_name == "transformers"


def test_a_card_that_is_not_lit_fts_stays_as_it_is(folder, tmp_path):
    cards = [tmp_path / "README.md", tmp_path / "adapter" / "README.md"]
    for card in cards:
        card.parent.mkdir(exist_ok=True)
        card.write_text(OWN)
    export_model(adapted(folder), None, tmp_path)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert [card.read_text() for card in cards] == [OWN, OWN]


def test_an_edited_card_stays_and_one_as_it_was_written_is_replaced(folder, tmp_path):
    export_model(adapted(folder), None, tmp_path / "out")
    whole, adapter = tmp_path / "out" / "README.md", tmp_path / "out" / "adapter" / "README.md"
    written = whole.read_text()
    edited = adapter.read_text().replace("# out", "# My model")
    adapter.write_text(edited)
    write_cards(tmp_path / "out", base_at("org/base", license="mit"), LORA)
    assert adapter.read_text() == edited != whole.read_text() != written
    assert ModelCard.load(whole).data.base_model == "org/base"


def test_a_base_on_the_hub_brings_its_license(tmp_path, monkeypatch):
    asked = []

    def download(*place, **options):
        asked.append((*place, options))
        (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
        return str(tmp_path / "README.md")

    monkeypatch.setattr(base_module, "hf_hub_download", download)
    monkeypatch.setattr(base_module, "offline_if_unreachable", nullcontext)
    base = base_of(Pretrained("org/base", revision="v1"))
    assert asked == [("org/base", "README.md", {"revision": "v1"})]
    assert (base.place, base.hub_id, base.license) == ("org/base", "org/base", "apache-2.0")
    write_cards(tmp_path / "out", base, LORA, repository="me/tuned")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.base_model, card.data.license) == ("org/base", "apache-2.0")
    assert "base_model:adapter:org/base" in card.data.tags
    assert 'adapter_id = "me/tuned"' in card.text


def test_the_packaged_default_says_where_its_base_is_without_a_hub(monkeypatch):
    monkeypatch.setattr(base_module, "hf_hub_download", None)
    named = {"hub_id": "org/base", "license": "mit"}
    base = base_of(Packaged("package", "file.gguf", "pip install package", "Base", **named))
    assert base == Base("Base", place="org/base", hub_id="org/base", license="mit")


def test_a_hub_that_fails_costs_no_export(monkeypatch):
    def fail(*place, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(base_module, "hf_hub_download", fail)
    monkeypatch.setattr(base_module, "offline_if_unreachable", nullcontext)
    assert base_at("org/base").license is None


def test_the_model_of_a_run_has_the_name_of_the_run(tmp_path):
    export = tmp_path / "runs" / "r1" / "export"
    (export / "adapter").mkdir(parents=True)
    assert name_of_folder(export) == "export"
    (export.parent / "summary.json").touch()
    assert {name_of_folder(place) for place in (export, export / "adapter")} == {"r1"}
    assert Pretrained(str(export)).name == "r1"
    with pytest.raises(ValueError, match=r"r1 is the folder of a run, not of a model.*r1/export"):
        Pretrained(str(export.parent)).check()
    (tmp_path / "runs" / "multirun.yaml").touch()
    assert name_of_folder(export) == "runs-r1"
