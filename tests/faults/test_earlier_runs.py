"""A run that has trained keeps its files, whatever is started in its folder afterwards."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from hydra.errors import CompactHydraException

from lit_ft.run.export_run import export_run
from lit_ft.run.files import read_summary
from tests.support.commands import TINY, run, start
from tests.support.damaging import flip
from tests.support.run_files import files
from tests.support.stopping import at

OPTIONS = ["optim=adamw", "trainer.max_steps=3", "logger=tensorboard"]

REFUSED = {
    "another adapter": ["adapter=lora"],
    "another model": ["+model.revision=other"],
    "another optimizer": ["optim=sgd"],
    "another seed": ["seed=1"],
    "another precision": ["trainer.precision=bf16-true"],
    "another batch": ["data.batch_size=3"],
    "a wrong type": ["optim.lr=high"],
    "a class that is not trusted": ["+callbacks.mine._target_=os.system"],
    "missing data": ["data.path=missing.jsonl"],
    "a missing checkpoint": ["resume=missing.ckpt"],
    "weights alone": ["resume=ALONE"],
    "a checkpoint that lacks a weight": ["resume=PART"],
    "an error in the first batch": [*at("on_train_batch_start", 3, fault="out_of_memory")],
    "no resume at all": ["resume=null"],
}


def test_refused_starts_change_no_byte_of_a_trained_run(job, tmp_path):
    job("run", *OPTIONS)
    folder = tmp_path / "run"
    part = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    alone = {name: part[name] for name in ("state_dict", "pytorch-lightning_version")}
    torch.save(alone, folder / "checkpoints" / "alone.ckpt")
    part["state_dict"].popitem()
    torch.save(part, folder / "checkpoints" / "part.ckpt")
    names = {"ALONE": "alone.ckpt", "PART": "part.ckpt"}
    before = files(folder)
    for what, changes in REFUSED.items():
        for short, name in names.items():
            changes = [one.replace(short, f"{folder}/checkpoints/{name}") for one in changes]
        with pytest.raises((CompactHydraException, SystemExit)):
            job("run", *OPTIONS, "trainer.max_steps=5", "resume=auto", *changes)
        assert files(folder) == before, what
    assert export_run(folder, folder=tmp_path / "export").is_dir()
    resumed = job("run", *OPTIONS, "trainer.max_steps=5", "resume=auto")
    assert (resumed["status"], resumed["steps"]) == ("completed", 5)
    assert [one["resume"] is None for one in resumed["starts"]] == [True, False]


def test_with_all_its_states_damaged_a_run_keeps_the_rest(job, tmp_path):
    job("run", *OPTIONS)
    folder = tmp_path / "run"
    best = folder / "checkpoints" / "best.ckpt"
    kept = best.read_bytes()
    best.unlink()  # it was the same file as last.ckpt
    best.write_bytes(kept)
    flip(folder / "checkpoints" / "last.ckpt")
    before = files(folder)
    with pytest.raises(CompactHydraException, match=r"last\.ckpt is damaged"):
        job("run", *OPTIONS, "trainer.max_steps=5", "resume=auto")
    assert files(folder) == before
    assert export_run(folder, checkpoint="best", folder=tmp_path / "export").is_dir()


@pytest.mark.process
def test_a_run_that_is_going_on_refuses_another_and_a_killed_one_does_not(tmp_path):
    options = [*TINY, "trainer.max_steps=400", "checkpoint.every_n_steps=1", f"run_dir={tmp_path}"]
    first = start(*options)
    for line in first.stdout:
        if line.startswith("step"):
            break
    status, told = run(*options, "resume=auto")
    assert status == 1
    assert f"A run is writing to {tmp_path}: process {first.pid} on" in told
    first.send_signal(signal.SIGKILL)
    first.communicate()
    status, told = run(*options, "resume=auto", "trainer.max_steps=1")
    assert "A run is writing" not in told


@pytest.mark.process
def test_resume_alone_repeats_the_arguments_of_the_run(tmp_path):
    options = [*TINY, "optim=adamw", "optim.lr=2e-3", "trainer.max_steps=2"]
    assert run(*options, f"run_dir={tmp_path}")[0] == 0
    status, told = run(f"run_dir={tmp_path}", "resume=auto", "trainer.max_steps=3")
    assert status == 0, told
    summary = read_summary(tmp_path)
    assert summary["steps"] == 3
    assert summary["config"]["optim"]["lr"] == 2e-3
    assert "model=tiny" in told and "optim.lr=2e-3" in told
    assert "trainer.max_steps (was 2, now 3)" in told


@pytest.mark.process
def test_a_folder_does_not_trust_for_the_command_line(tmp_path):
    """The record of a folder that somebody else made may say anything."""
    options = [*TINY, "trainer.max_steps=1", *at("on_train_batch_start", 9)]
    status, told = run(*options, f"run_dir={tmp_path}", cwd=Path.cwd())
    assert status == 0, told
    before = files(tmp_path)
    status, told = run(f"run_dir={tmp_path}", "resume=auto", "trainer.max_steps=2")
    assert status == 1
    assert "add trusted_packages=[tests] to the command line" in told
    assert files(tmp_path) == before
