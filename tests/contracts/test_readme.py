"""The README says what is there: its commands compose, its code runs, its names exist."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from transformers import LlamaConfig, LlamaForCausalLM

from lit_ft.data.formats import detect
from tests.support.running import CONF

README = CONF.parent / "README.md"
TEXT = README.read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def commands(program: str) -> list[str]:
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    inline = re.findall(rf"`({re.escape(program)} [^`\n]*)`", TEXT)
    return [line for line in [*lines, *inline] if line.startswith(program)]


def section(title: str) -> str:
    return TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]


def table(title: str) -> Iterator[list[str]]:
    for row in re.findall(r"^\| (.*) \|$", section(title), re.MULTILINE):
        yield [cell.strip() for cell in row.split(" | ")]


@contextmanager
def conf() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def composed(overrides: list[str]) -> DictConfig:
    """Compose, and resolve every value."""
    config = compose("train", overrides)
    OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    return config


def first_of_a_sweep(argument: str) -> str:
    override = OverridesParser.create().parse_override(argument)
    if not override.is_sweep_override():
        return argument
    return f"{override.get_key_element()}={next(override.sweep_string_iterator())}"


@pytest.mark.parametrize("command", [c for c in commands("python train.py") if "--" not in c])
def test_a_command_composes(command):
    arguments = shlex.split(command, comments=True)[2:]
    with conf():
        composed([first_of_a_sweep(one) for one in arguments if one != "-m"])


@pytest.mark.parametrize(
    "verb", sorted({command.split()[2] for command in commands("python -m lit_ft.")})
)
def test_a_verb_knows_the_options_it_is_shown_with(verb, capsys):
    shown = {
        option
        for command in commands(f"python -m {verb}")
        for option in re.findall(r"--[\w-]+", command)
    }
    with pytest.raises(SystemExit) as stop:
        import_module(verb).main(["--help"])
    assert stop.value.code == 0
    assert shown <= set(re.findall(r"--[\w-]+", capsys.readouterr().out))


def test_the_names_you_know_lead_to_names_that_exist():
    with conf():
        config = composed(["adapter=lora"])
        for row in list(table("The names you know"))[2:]:
            for ours in re.findall(r"`([^`]+)`", row[1]):
                if "=" in ours:
                    composed(["adapter=lora"] * ("adapter." in ours) + [ours])
                else:
                    key, _, name = ours.rpartition(".")
                    assert name in (OmegaConf.select(config, key) if key else config), ours


@pytest.mark.parametrize("row", list(table("Choices"))[2:], ids=lambda row: row[0])
def test_the_choices_are_those_in_conf(row):
    group = row[0].strip("`")
    there = {path.stem for path in (CONF / group).glob("*.yaml")}
    # What a choice is explained with stands in parentheses.
    named = set(re.findall(r"`([^`]+)`", re.sub(r"\([^)]*\)", "", row[1])))
    assert named == there


def test_a_line_of_each_format_is_detected():
    [lines] = blocks("json")
    found = [type(detect(json.loads(line))).__name__ for line in lines.splitlines()]
    assert found == ["Chat", "Alpaca", "PromptCompletion", "Text"]


@pytest.fixture
def project(tmp_path, monkeypatch, tokenizer) -> Path:
    """A folder with the models and the data that the README's code names."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    for folder in ("my-model", "runs/r1/export"):
        model.save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
    rows = [{"prompt": f"{n} + 2?", "completion": str(n + 2)} for n in range(100)]
    (tmp_path / "my.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIT_FT_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.split("\n")[0])
def test_the_code_runs(code, project):
    exec(compile(code, str(README), "exec"), {"__name__": "readme"})
    if "ExportHF" in code:
        assert (project / "tuned" / "model.safetensors").is_file()
    if "LastCheckpoint" in code:
        assert (project / "checkpoints" / "last.ckpt").is_file()
