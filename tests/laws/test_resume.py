"""A run that stops and resumes is the run that never stopped: the whole job, bit for bit."""

from __future__ import annotations

import pytest
import torch

from lit_ft.run.files import read_summary
from tests.support.checkpoints import same, state
from tests.support.running import LORA, QLORA
from tests.support.stopping import at, stopped

GALORE = ["galore.rank=4", "schedule=cosine", "trainer.gradient_clip_val=1.0"]

SUBSPACE = ["optim=galore_subspace", *GALORE, "trainer.accumulate_grad_batches=4"]

SUBSPACE_8BIT = ["optim=galore_subspace_8bit", *GALORE, "galore.refresh.every=3"]

SVD = ["optim=galore_svd", *GALORE, "galore.refresh.every=3"]

BLOCKS = ["update=blocks", "optim=adamw", "callbacks.blocks.every=2"]

LAYERWISE = ["update=[blocks,layerwise]", "callbacks.layerwise.min_grad_bytes=0"]

STOPPED_BY_THE_FIRST_VALIDATION = ["+callbacks.early_stopping.stopping_threshold=1000"]


@pytest.mark.parametrize(
    ("hook", "step", "options"),
    [
        ("on_train_batch_start", 0, []),
        ("on_train_batch_start", 3, []),  # saved after the epoch's last, short window
        ("on_train_batch_start", 4, []),  # a validation comes before the step is complete
        ("on_validation_batch_start", 2, []),
        ("on_train_batch_start", 5, LORA),
        ("on_train_batch_start", 3, QLORA),
        ("on_train_batch_start", 4, SUBSPACE),
        ("on_validation_batch_start", 2, SUBSPACE_8BIT),
        ("on_train_batch_start", 5, SVD),
        ("on_train_batch_start", 4, BLOCKS),  # inside a turn
        ("on_train_batch_start", 5, [*BLOCKS, *LAYERWISE]),  # between two
        ("on_train_batch_start", 4, [*BLOCKS, "callbacks.blocks.state=keep"]),
    ],
)
def test_a_stopped_run_resumes_to_the_uninterrupted_one_bit_for_bit(
    job, tmp_path, hook, step, options
):
    whole = job("whole", *options)
    stopped(job, "parts", *options, *at(hook, step))
    first = read_summary(tmp_path / "parts")
    assert (first["status"], first["error"]) == ("interrupted", None)
    assert first["steps"] == (step if hook.startswith("on_validation") else step + 1)
    resumed = job("parts", *options, "resume=auto")
    assert (resumed["status"], resumed["steps"]) == ("completed", 9)
    same(tmp_path / "whole", tmp_path / "parts")
    for key in ("initial_val_loss", "val_loss", "train_loss"):
        assert resumed[key] == whole[key], key


def test_a_larger_max_steps_goes_on_inside_the_epoch(job, tmp_path):
    constant = "schedule=constant"  # a cosine's length is that of the run
    job("whole", constant, "trainer.max_steps=7")
    job("parts", constant, "trainer.max_steps=2")
    job("parts", constant, "trainer.max_steps=7", "resume=auto")
    same(tmp_path / "whole", tmp_path / "parts")


def test_a_run_of_epochs_resumes_inside_one(job, tmp_path):
    """tests/laws/test_resume_at_each_step.py stops at every step, without the rest of the job."""
    options = ["schedule=cosine", "trainer.max_steps=-1", "trainer.max_epochs=2"]
    whole = job("whole", *options)
    stopped(job, "parts", *options, *at("on_train_batch_start", 1))
    resumed = job("parts", *options, "resume=auto")
    assert resumed["steps"] == whole["steps"] == 8
    same(tmp_path / "whole", tmp_path / "parts")


def test_a_run_that_early_stopping_has_ended_goes_on_inside_its_epoch(job, tmp_path):
    whole = job("whole", "trainer.max_steps=5")
    stopping = "callbacks=[default,early_stopping]"
    first = job("parts", stopping, "trainer.max_steps=5", *STOPPED_BY_THE_FIRST_VALIDATION)
    assert (first["status"], first["steps"]) == ("completed", 2)
    resumed = job("parts", "trainer.max_steps=5", "resume=auto")
    assert (resumed["steps"], resumed["val_loss"]) == (5, whole["val_loss"])
    same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_another_rate_or_decay_is_obeyed_at_resume(job, tmp_path, schedule):
    """The weights are those of a run that had the rate for all steps after the first two."""
    options = ["optim=adamw", f"schedule={schedule}", "schedule.warmup=0", "trainer.max_steps=4"]
    stopped(job, "parts", *options, *at("on_train_batch_start", 1))
    job("slow", *options, f"resume={tmp_path}/parts/checkpoints/last.ckpt", "optim.lr=0")
    job("fast", *options, f"resume={tmp_path}/parts/checkpoints/last.ckpt", "optim.lr=1e-1")
    before, slow, fast = (state(tmp_path / name)[0] for name in ("parts", "slow", "fast"))
    assert all(torch.equal(before[name], slow[name]) for name in before)
    assert any((before[name] - fast[name]).abs().max() > 0.05 for name in before)
