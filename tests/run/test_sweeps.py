"""A sweep that is killed and started again: real processes of `python train.py -m`."""

from __future__ import annotations

import signal

import pytest

from lit_ft.run.files import read_summary
from tests.support.commands import SWEPT, run, start
from tests.support.running import run_job

JOB = [
    *SWEPT,
    "strategy=cpu",
    "optim=adamw",
    "callbacks=default",
    "trainer.max_steps=12",
    "trainer.log_every_n_steps=1",
    "checkpoint.every_n_steps=1",
]


@pytest.mark.slow
def test_a_killed_sweep_skips_whole_jobs_and_continues_the_cut_one(tmp_path):
    sweep = ["-m", f"run_dir={tmp_path}", *JOB, "resume=auto", "optim.lr=1e-4,1e-2,1e-3"]
    process = start(*sweep)
    fifths = 0
    for line in process.stdout:
        fifths += line.startswith("step 5/12")
        if fifths == 2:  # that of the second job
            process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    whole, cut = read_summary(tmp_path / "0"), read_summary(tmp_path / "1")
    assert (whole["status"], cut["status"]) == ("completed", "interrupted")
    assert not (tmp_path / "2" / "summary.json").exists()
    last = (tmp_path / "0" / "checkpoints" / "last.ckpt").stat().st_mtime_ns

    status, output = run(*sweep)
    assert status == 0, output
    assert f"{tmp_path}/0 is finished: 12 steps, val_loss" in output
    assert read_summary(tmp_path / "0") == whole
    assert (tmp_path / "0" / "checkpoints" / "last.ckpt").stat().st_mtime_ns == last
    assert output.count("step 12/12") == 2
    assert output.count("step 1/12") == 1  # of the third job, which had not begun
    for number in (1, 2):
        summary = read_summary(tmp_path / str(number))
        assert (summary["status"], summary["steps"]) == ("completed", 12)
    uninterrupted = run_job(tmp_path / "uninterrupted", *JOB, "optim.lr=1e-2")
    cut = read_summary(tmp_path / "1")
    assert cut["val_loss"] == pytest.approx(uninterrupted["val_loss"], rel=1e-5)
