"""Secrets reach what needs them, and nothing that a run prints or leaves: real runs, all files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import yaml

from tests.support.commands import SWEPT, run
from tests.support.leaky import PRINTED, Leaky

OVERRIDE = "Planted/in+an=override1"
FILE = "planted_in_a_file"
URL = "http://someone:PlantedInAnAddress@proxy:3128"
SHAPE = "hf_PlantedByItsShapeAlone0123"
ENVIRONMENT = "planted-in-the-environment"
PLANTED = [OVERRIDE, FILE, "PlantedInAnAddress", SHAPE, ENVIRONMENT]
CLASS = f"{Leaky.__module__}.{Leaky.__qualname__}"
SHORT = ["callbacks=default", "trainer.max_steps=2", "trainer.log_every_n_steps=1"]


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Plant a secret in each place that a run reads one from."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("HF_TOKEN", ENVIRONMENT)
    monkeypatch.setenv("LIT_FT_CACHE", str(tmp_path / "cache"))
    leaky = {"_target_": CLASS, "password": FILE, "fails": False}
    file = tmp_path / "conf" / "experiment" / "leaky.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("# @package _global_\n" + yaml.dump({"callbacks": {"leaky": leaky}}))
    return [
        f"run_dir={tmp_path / 'run'}",
        f"hydra.searchpath=[file://{tmp_path / 'conf'}]",
        "experiment=leaky",
        "trusted_packages=[tests]",
        f"+callbacks.leaky.api_key={OVERRIDE}",
        f"+callbacks.leaky.options={{proxy: '{URL}', note: {SHAPE}}}",
        *SWEPT,
        *SHORT,
    ]


def leaks(folder: Path, output: str) -> list[str]:
    """Return what shows a planted secret: files of the run, and `output` itself."""
    texts = {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    texts["output"] = output.encode()
    return [
        f"{name}: {secret}"
        for name, text in texts.items()
        for secret in PLANTED
        if secret.encode() in text
    ]


def real(*values: str) -> str:
    return PRINTED + hashlib.sha256("\n".join(values).encode()).hexdigest()


def test_a_finished_run_uses_its_secrets_and_shows_none(arguments, tmp_path):
    status, output = run(*arguments, "logger=[tensorboard,csv]")
    assert status == 0, output
    assert real(OVERRIDE, FILE, URL, SHAPE, ENVIRONMENT) in output
    assert leaks(tmp_path / "run", output) == []
    assert "logged: ***" in (tmp_path / "run" / "train.log").read_text()
    assert "LIT_FT_SECRET_" in (tmp_path / "run" / ".hydra" / "overrides.yaml").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (f"foo.token={OVERRIDE}", "Could not override 'foo.token'"),
        (f"+foo.token={OVERRIDE}", "there is no 'foo'"),
        (f"+optim.api_key=[{OVERRIDE}", "optim.api_key"),
        (f"optim.lr={SHAPE}", "optim.lr"),
        (f"data.path={URL}/rows.jsonl", r"no such file"),
        ("callbacks.leaky.fails=true", "RuntimeError"),
    ],
)
def test_a_run_that_is_refused_or_fails_shows_no_secret(wrong, said, arguments, tmp_path):
    status, output = run(*arguments, wrong)
    assert status == 1
    assert said in output
    assert leaks(tmp_path / "run", output) == []


@pytest.mark.slow
def test_a_sweep_shows_no_secret_nor_do_the_files_of_a_logger(arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")  # it records the command line
    status, output = run("-m", *arguments, "seed=1,2", "logger=wandb")
    assert status == 0, output
    assert output.count(real(OVERRIDE, FILE, URL, SHAPE, ENVIRONMENT)) == 2
    assert (tmp_path / "run" / "multirun.yaml").is_file()
    assert list((tmp_path / "run").rglob("*.wandb"))
    assert leaks(tmp_path / "run", output) == []


@pytest.mark.slow
def test_the_processes_of_two_ranks_get_the_secrets_and_show_none(arguments, tmp_path):
    status, output = run(*arguments, "strategy=ddp", "trainer.devices=2", "optim=adamw")
    assert status == 0, output
    assert output.count(real(OVERRIDE, FILE, URL, SHAPE, ENVIRONMENT)) == 2
    assert leaks(tmp_path / "run", output) == []


@pytest.mark.slow
def test_a_resumed_run_says_that_a_secret_must_be_given_again(arguments, tmp_path):
    status, output = run(*arguments)
    assert status == 0, output
    stored = yaml.safe_load((tmp_path / "run" / ".hydra" / "overrides.yaml").read_text())
    longer = ["resume=auto", "trainer.max_steps=3"]
    status, output = run(*stored, *longer)
    assert status == 1
    assert "callbacks.leaky.api_key=${oc.env:LIT_FT_SECRET_CALLBACKS__LEAKY__API_KEY}" in output
    assert "Give the secret again: callbacks.leaky.api_key=SECRET" in output
    # A checkpoint's path, unlike `auto`, repeats no arguments of its run.
    last = f"resume={tmp_path}/run/checkpoints/last.ckpt"
    without = [one for one in arguments if "options" not in one]
    status, output = run(*without, last, "trainer.max_steps=3")
    assert status == 0, output
    assert "The checkpoint's run was given a secret" in output
    assert leaks(tmp_path / "run", output) == []
