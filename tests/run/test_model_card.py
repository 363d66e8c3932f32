"""A run's model card says what summary.json says, and its code loads the model."""

import json
import re
from pathlib import Path

import pytest
from gguf import Metadata
from huggingface_hub import ModelCard

from lit_ft.run.export_run import export_run
from lit_ft.run.model_card import training_of
from tests.support.jobs import run_on_thirteen_rows, write_model_with_dropout, write_thirteen_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder in which a run has trained and exported a LoRA adapter."""
    place = tmp_path_factory.mktemp("place")
    model = write_model_with_dropout(place / "base")
    (place / "base" / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    (place / "private").mkdir()
    rows = write_thirteen_rows(place / "private")
    export = [f"+callbacks.export.{part}" for part in ("_target_=lit_ft.callbacks.ExportHF",)]
    export += [f"+callbacks.export.folder={place}/runs/r1/export"]
    lora = ["adapter=lora", "adapter.r=2", "optim.lr=1e-3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        run_on_thirteen_rows(place / "runs" / "r1", model, rows, *export, *lora)
    return place


@pytest.fixture
def run_dir(place, monkeypatch):
    monkeypatch.chdir(place)
    return Path("runs/r1")


def facts_of(text):
    return dict(re.findall(r"^\| (.+?) \| (.+) \|$", text, flags=re.MULTILINE))


@pytest.mark.parametrize("folder", ["export", "export/adapter"])
def test_the_facts_are_those_of_the_summary(run_dir, place, folder):
    card = ModelCard.load(run_dir / folder / "README.md")
    summary = json.loads((run_dir / "summary.json").read_text())
    facts = facts_of(card.text)
    assert facts["training rows"] == f"{summary['data']['train']['examples']:,}" == "13"
    assert facts["trained on"] == "`rows.jsonl`"
    assert facts["steps"] == str(summary["steps"]) == "9"
    assert facts["rows in a step"].startswith("4 ")
    for when, name in {"before": "initial_val_loss", "after": "val_loss"}.items():
        assert facts[f"validation loss {when}"].startswith(f"{summary[name]:.4f} ")
    assert f"(perplexity {summary['val_perplexity']:.2f})" in facts["validation loss after"]
    assert (facts["method"], facts["name"]) == ("LoraConfig, r=2, lora_alpha=32", "base")
    assert (card.data.model_name, card.data.license, card.data.datasets) == ("r1", "mit", None)
    assert "python train.py run_dir=r1 " in card.text
    assert " model=pretrained model.name_or_path=base " in card.text
    assert "private" not in card.text
    assert str(place) not in str(card)


@pytest.mark.parametrize("folder", ["export", "export/adapter"])
def test_the_code_of_a_card_runs(run_dir, folder, capsys):
    text = (run_dir / folder / "README.md").read_text()
    [code] = re.findall(r"```python\n(.*?)\n```", text, flags=re.DOTALL)
    found = {}
    exec(code.replace("max_new_tokens=128", "max_new_tokens=2"), found)
    assert found["model"].config.vocab_size == 49152
    assert f'"{run_dir / folder}"' in code


def test_a_gguf_file_of_the_export_is_named_after_the_run(run_dir):
    assert Metadata.load(model_path=run_dir / "export").name == "r1"


def test_an_export_of_the_best_weights_says_their_step_and_loss(run_dir, tmp_path):
    export_run(run_dir, checkpoint="best", folder=tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    best = json.loads((run_dir / "checkpoints" / "best.json").read_text())
    facts = facts_of(card.text)
    assert facts["steps"] == str(best["step"])
    assert facts["validation loss after"].startswith(f"{best['val_loss']:.4f} ")
    assert card.data.model_name == "r1"


def test_a_card_names_hub_datasets_and_neither_secrets_nor_places():
    sources = [{"path": "org/set"}, {"path": "python-docstrings"}, {"path": "/home/me/a.csv"}]
    arguments = [
        "data.path=/home/me/a.csv",
        "x.url=https://me:pass@host/a?b",
        "k=hf_abcdefghijklmnopqrst",
    ]
    training = training_of(
        {"config": {"data": {"sources": sources}}, "starts": [{"arguments": arguments}]},
        steps=None,
        val_loss=None,
    )
    assert training.datasets == ["org/set"]
    assert (
        training.command
        == "python train.py data.path=a.csv 'x.url=https://me:***@host/a?b' 'k=***'"
    )
    assert "/home/me" not in str(training)
    assert "Loss" not in training.tables
