"""Files of a stranger: a refusal in a line, and nothing outside the folder is written to."""

from __future__ import annotations

import gzip
import json
import logging
import os
from pathlib import Path

import pytest
from jinja2 import TemplateError

from lit_ft.chat import main as chat
from lit_ft.chat import reply
from lit_ft.data import files
from lit_ft.data.rendering import CostlyTemplate
from lit_ft.export import main as export
from lit_ft.models import Pretrained, export_model
from lit_ft.run.own_arguments import with_own_arguments
from lit_ft.run.resume import checkpoint_to_resume
from lit_ft.run.run_log import RunLog
from lit_ft.storage.atomic import temporary_path, write_text
from lit_ft.storage.damage import damage
from lit_ft.storage.json_file import read_json
from lit_ft.storage.permissions import open_to_others
from tests.support.tiny_model import tiny_model
from tests.support.tokenizer import byte_level_tokenizer

CONFIG = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 16}
CONFIG |= {"num_attention_heads": 1, "intermediate_size": 8}
DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", DEEP),
        ("config.json", json.dumps({**CONFIG, "num_attention_heads": 0})),
        ("config.json", json.dumps({**CONFIG, "hidden_act": "os.system"})),
        ("tokenizer_config.json", DEEP),
        ("tokenizer_config.json", '{"tokenizer_class": "pipeline"}'),
        ("tokenizer.json", "{}"),
    ],
)
def test_a_model_that_cannot_be_read_is_named(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    byte_level_tokenizer().save_pretrained(tmp_path)
    (tmp_path / name).write_text(text)
    source = Pretrained(str(tmp_path))
    with pytest.raises((ValueError, OSError), match=tmp_path.name):
        source.load_tokenizer()
        source.build_empty()
    with pytest.raises(SystemExit, match=tmp_path.name):
        chat([str(tmp_path), "--prompt", "Hi"])


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{# #}"]
)
def test_a_template_that_fails_is_an_error_of_the_template(template: str) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises((CostlyTemplate, TemplateError), match="The chat template"):
        reply(None, tokenizer, [{"role": "user", "content": "Hi"}], None)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".json.gz", ".txt.gz", ".csv.gz"])
def test_a_file_that_expands_beyond_any_text_is_not_read_to_its_end(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "EXPANDED_BYTES", 1 << 20)
    file = tmp_path / f"a{suffix}"
    file.write_bytes(gzip.compress(b"a" * (4 << 20)))
    with pytest.raises(ValueError, match=rf"{file.name}: expands to more than 200 times its size"):
        list(files.read(file))


@pytest.mark.parametrize(
    ("summary", "told"),
    [
        (DEEP, "is damaged: maximum recursion depth"),
        ("{}", "has no status"),
        ('{"status": "completed", "config": [1]}', "has no config"),
        ('{"status": "completed", "config": {"module": "x"}}', "has no module"),
        (
            json.dumps(
                {
                    "status": "completed",
                    "config": {
                        "module": {"_target_": "lit_ft.data.formats.text.Text"},
                        "data": {},
                        "trainer": {},
                    },
                }
            ),
            "describes no module: Text",
        ),
        (
            '{"status": "completed", "config": {"module": {"_target_": ["a"]}, "data": {}, '
            '"trainer": {}}}',
            "is no class that a configuration may name",
        ),
        (
            json.dumps(
                {
                    "status": "completed",
                    "config": {
                        "module": {"_target_": "lit_ft.CausalLMModule", "x": 1},
                        "data": {},
                        "trainer": {},
                    },
                }
            ),
            "describes no module: ",
        ),
    ],
)
def test_a_summary_that_describes_no_run_is_named(tmp_path: Path, summary: str, told: str) -> None:
    (tmp_path / "summary.json").write_text(summary)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").mkdir()
    with pytest.raises(SystemExit, match=told):
        export([str(tmp_path)])


@pytest.mark.timeout(60)
def test_nothing_waits_for_a_fifo(tmp_path: Path) -> None:
    run, folder = tmp_path / "run", tmp_path / "folder"
    (run / "checkpoints").mkdir(parents=True)
    (run / ".hydra").mkdir()
    folder.mkdir()
    for file in (run / "checkpoints" / "last.ckpt", run / ".hydra" / "overrides.yaml"):
        os.mkfifo(file)
    os.mkfifo(folder / "__0_0.distcp")
    os.mkfifo(tmp_path / "best.json")
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged: it is no file"):
        checkpoint_to_resume("auto", run)
    assert damage(folder) == "__0_0.distcp in it is no file"
    with pytest.raises(ValueError, match="it is no file"):
        read_json(tmp_path / "best.json")
    given = [f"run_dir={run}", "resume=auto"]
    assert with_own_arguments(given) == (given, [])


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    own, folder = tmp_path / "own", tmp_path / "run"
    own.write_text("precious")
    (folder / "adapter").mkdir(parents=True)
    names = ("config.json", "model.safetensors", "generation_config.json", "adapter/README.md")
    links = [folder / name for name in (*names, "train.log", "moved.log")]
    links.append(temporary_path(folder / "summary.json"))
    for link in links:
        link.symlink_to(own)
    export_model(tiny_model("llama"), None, folder)
    write_text(folder / "summary.json", "{}")
    log = RunLog(folder / "train.log")
    logging.getLogger().error("said")
    log.move_to(folder / "moved.log")
    log.close()
    assert "said" in (folder / "moved.log").read_text()
    assert (folder / "config.json").is_file()
    assert own.read_text() == "precious"


def test_nobody_else_may_read_what_a_link_among_the_weights_leads_to(tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.touch(mode=0o600)
    (tmp_path / "export" / "adapter").mkdir(parents=True)
    for place in ("model.safetensors", "adapter/deeper.safetensors"):
        (tmp_path / "export" / place).symlink_to(private)
    open_to_others(tmp_path / "export")
    assert private.stat().st_mode & 0o777 == 0o600
