"""Two ranks on this machine do what one does."""

from __future__ import annotations

import json
import signal
import time
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import distributed as dist

from lit_ft.distributed.waiting import others_wait
from tests.support.commands import TINY, run, signal_at, start
from tests.support.ranks import WORLD
from tests.support.running import run_job
from tests.support.tiny_module import trainer_of

pytestmark = pytest.mark.slow

JOB = [
    *TINY,
    "data.max_val_examples=6",
    "trainer.max_steps=4",
    "trainer.accumulate_grad_batches=2",
    "trainer.gradient_clip_val=0.5",
    "trainer.log_every_n_steps=1",
    "optim=sgd",
]
TWO_RANKS = ["strategy=ddp", "trainer.devices=2", "data.batch_size=2"]


def weights(run_dir):
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_two_ranks_train_the_weights_that_one_does(tmp_path):
    one = run_job(tmp_path / "one", *JOB, "data.batch_size=4")
    status, output = run(*JOB, *TWO_RANKS, cwd=tmp_path)  # in a folder named by the time
    assert status == 0, output
    [run_dir] = (tmp_path / "runs").iterdir()
    two = json.loads((run_dir / "summary.json").read_text())
    assert two["status"] == "completed"
    assert two["config"]["run_dir"].endswith(run_dir.name)
    assert (two["steps"], two["tokens"]) == (one["steps"], one["tokens"])
    for key in ("initial_val_loss", "val_loss", "train_loss"):
        assert two[key] == pytest.approx(one[key], rel=1e-6), key
    torch.testing.assert_close(weights(run_dir), weights(tmp_path / "one"), rtol=0, atol=1e-6)
    assert output.count("completed") == 1
    assert "Warning" not in output and "sync_dist" not in output


def test_the_first_of_two_ranks_scores_what_one_process_does(tmp_path):
    scored = [*JOB, "eval.tasks=[docstring_choice]", "eval.limit=8"]
    one = run_job(tmp_path / "one", *scored, "data.batch_size=4")
    status, output = run(f"run_dir={tmp_path / 'two'}", *scored, *TWO_RANKS)
    assert status == 0, output
    two = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert two["scores"] == one["scores"] and list(two["scores"]) == ["docstring_choice"]


class AtItsEnd(Callback):
    """Lets the first rank alone do something for a while once the model is trained."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.did_it = False

    def on_fit_end(self, trainer, pl_module):
        with others_wait(trainer) as is_first:
            if is_first:
                time.sleep(self.seconds)
                self.did_it = True


def work_longer_than_the_timeout(folder):
    """Let the first rank work for longer than ranks wait for each other in a collective."""
    dist.destroy_process_group()
    dist.init_process_group("gloo", timeout=timedelta(seconds=10))  # in the way of Lightning
    end = AtItsEnd(seconds=15)
    trainer = trainer_of(folder, strategy="ddp", devices=WORLD, max_steps=1, callbacks=[end])
    trainer.fit(BoringModel())
    trainer.strategy.barrier()
    return end.did_it


def test_the_first_rank_may_work_longer_than_the_others_wait_in_a_collective(tmp_path, on_both):
    assert on_both(work_longer_than_the_timeout, tmp_path) == [True, False]


def test_sigterm_on_one_rank_stops_both_after_a_save(tmp_path):
    run_dir = tmp_path / "run"
    process = start(f"run_dir={run_dir}", *JOB, *TWO_RANKS, "trainer.max_steps=5000")
    status, output = signal_at(process, "step 3/", signal.SIGTERM)
    assert status == 143, output
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert summary["steps"] >= 3
    last = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == summary["steps"]


def test_a_sweep_over_several_processes_is_refused(tmp_path):
    job = [setting for setting in JOB if not setting.startswith("~")]
    status, output = run("-m", "seed=1,2", f"run_dir={tmp_path}", *job, *TWO_RANKS)
    assert status == 1
    assert "trainer.devices=1" in output
