"""`python train.py` in a process of its own: exit status, messages, folders."""

from __future__ import annotations

import json

import pytest
import torch

from lit_ft.measure import peak_bytes
from lit_ft.run.files import read_summary
from tests.support.commands import SWEPT, TINY, run
from tests.support.running import run_job

MISTAKES = {
    "optim._target_=os.system": "no class that a configuration may name",
    "resume=nowhere.ckpt": "nowhere.ckpt: there is no such checkpoint",
    "data.path=missing.jsonl": "missing.jsonl: no such file",
    "optim.lr=-1": "optim.lr=-1: must be a number of at least 0",
    "schedule.warmup=-1": "warmup",
    "data.batch_size=0": "data.batch_size=0: must be a whole number of at least 1",
    "+optim.foreach=true": "`fused` and `foreach` cannot be `True` together",
    "+data.source_options.knd=x": r"does not take the options \['knd'\]",
    "validate_only=no": "validate_only=no: must be true or false",
    "+model.config.hidden_sise=8": "Did you mean hidden_size",
    "model.config.hidden_size=x": "hidden_size.* expected int",
    "trainer.precision=16-true": "trainer.precision=bf16-true",
    "+optim.learning_rate=1": "learning_rate",
    "data.path=null": r"data\.path=my\.jsonl",
    "data.format=alpacca": "There are: alpaca, chat",
    "+callbacks.samples.max_new_tokens=4": "callbacks.samples has no class.*callbacks=default",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_setting_that_cannot_work_ends_the_run_before_the_model_loads(mistake, tmp_path):
    # What train.py raises for Hydra to print without a traceback.
    with pytest.raises(Exception, match=MISTAKES[mistake]) as error:
        run_job(tmp_path, *TINY, mistake)
    assert type(error.value).__name__ == "CompactHydraException"
    summary = read_summary(tmp_path)
    assert (summary["status"], summary["model"]["parameters"]) == ("failed", None)


def test_a_mistake_is_one_message_and_exit_status_1(tmp_path):
    status, output = run(f"run_dir={tmp_path}", *TINY, "resume=nowhere.ckpt")
    assert status == 1
    assert "ValueError: resume=nowhere.ckpt: there is no such checkpoint" in output
    assert "Traceback" not in output


def test_a_mistyped_name_is_answered_with_those_that_exist(tmp_path):
    status, output = run("trainer.max_step=3", cwd=tmp_path)
    assert status == 1
    assert "Did you mean max_steps" in output
    status, output = run("optim=adamww", cwd=tmp_path)
    assert status == 1
    assert "adamw_8bit" in output


def test_help_shows_commands_choices_and_values(tmp_path):
    status, output = run("--help", cwd=tmp_path)
    assert status == 0
    for shown in ("data.path=my.jsonl", "strategy: auto", "trainer.max_steps=40", "--cfg job"):
        assert shown in output
    assert max(map(len, (line for line in output.splitlines() if ": " not in line))) <= 100
    assert not list(tmp_path.iterdir())


def test_a_sweep_leaves_a_summary_of_each_run_in_its_folder(tmp_path):
    status, output = run(
        "-m",
        f"run_dir={tmp_path}",
        *SWEPT,
        "optim=adamw,sgd",
        "seed=1,2",
        "trainer.max_steps=2",
        "trainer.log_every_n_steps=1",
    )
    assert status == 0, output
    summaries = [json.loads(p.read_text()) for p in sorted(tmp_path.glob("*/summary.json"))]
    ran = [(s["config"]["optim"]["_target_"].split(".")[-1], s["seed"]) for s in summaries]
    assert ran == [("AdamW", 1), ("AdamW", 2), ("SGD", 1), ("SGD", 2)]
    assert all(s["status"] == "completed" and s["steps"] == 2 for s in summaries)
    assert not (tmp_path / "summary.json").exists()


def test_the_peak_of_a_run_is_not_that_of_the_sweeps_largest(tmp_path):
    before = torch.ones(2**28)
    largest = peak_bytes().value
    assert largest > before.nbytes
    del before
    summary = run_job(tmp_path, *SWEPT, "callbacks=none", "trainer.max_steps=1")
    assert summary["peak_bytes"]["value"] < largest - 2**28
