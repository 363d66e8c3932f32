"""The job as a whole: resuming, stopping, failing, measuring only."""

from __future__ import annotations

import csv
import math

import pytest
import torch
from hydra.errors import CompactHydraException
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, StrategyRegistry

from lit_ft.callbacks import AutoBatchSize, MemoryMonitor, StopOnSignal
from lit_ft.distributed import FSDP2Strategy, TensorParallelStrategy
from lit_ft.models import Pretrained
from lit_ft.run.files import read_summary
from lit_ft.run.job import _turn, sensible_precision
from tests.support.checkpoints import state
from tests.support.running import LORA, QLORA
from tests.support.stopping import at


def test_a_checkpoint_of_an_adapter_holds_no_frozen_weight(job, tmp_path):
    job("run", *LORA, "trainer.max_steps=1")
    weights, _, _ = state(tmp_path / "run")
    assert weights and all("lora_" in name for name in weights)


def test_a_named_checkpoint_resumes_in_another_folder(job, tmp_path):
    first = job("first", "trainer.max_steps=2")
    checkpoint = tmp_path / "first" / "checkpoints" / "last.ckpt"
    second = job("second", f"resume={checkpoint}", "trainer.max_steps=3")
    assert second["initial_val_loss"] == first["initial_val_loss"] is not None
    assert second["steps"] == 3


def test_a_paged_optimizer_goes_on_from_one_that_is_not(job):
    job("run", "optim=adamw_8bit", "trainer.max_steps=1")
    job("run", "optim=adamw_8bit_paged", "trainer.max_steps=2", "resume=auto")


def test_out_of_memory_names_the_settings_that_need_less(job, tmp_path):
    with pytest.raises(CompactHydraException, match="Tried to allocate 2.00 GiB"):
        job("run", *at("on_before_backward", 1, fault="out_of_memory"))
    summary = read_summary(tmp_path / "run")
    assert (summary["status"], summary["steps"]) == ("out_of_memory", 1)
    assert (
        "The largest part of the memory: activations and the rest, " in summary["error"]["message"]
    )
    for setting in (
        "optimizer state 0.0",
        "data.batch_size=1 with twice the trainer.accumulate_grad_batches",
        "module.activation_checkpointing=true",
        "adapter=lora",
        "optim=galore_subspace_8bit",
        "galore.rank below 128",
    ):
        assert setting in summary["error"]["message"]


def test_remedies_that_are_in_use_are_not_named(job, tmp_path):
    with pytest.raises(CompactHydraException):
        job("run", *QLORA, *at("on_before_backward", 0, fault="out_of_memory"), "data.batch_size=1")
    message = read_summary(tmp_path / "run")["error"]["message"]
    assert message.endswith("Settings that need less memory: data.max_length below 512.")


def test_a_failure_is_recorded(job, tmp_path):
    with pytest.raises(CompactHydraException, match="there is no 'lrr' in optim"):
        job("run", "+optim.lrr=1")
    summary = read_summary(tmp_path / "run")
    assert (summary["status"], summary["model"]["parameters"]) == ("failed", None)
    assert "lrr" in summary["error"]["message"]


def test_validate_only_measures_and_writes_no_model(job, tmp_path):
    fresh = job("measured", "validate_only=true")
    assert fresh["status"] == "completed" and fresh["steps"] == 0
    assert fresh["val_loss"] == fresh["initial_val_loss"] > 0
    assert fresh["val_perplexity"] == pytest.approx(math.exp(fresh["val_loss"]))
    assert not (tmp_path / "measured" / "checkpoints").exists()
    trained = job("run", "trainer.max_steps=4")
    again = job("run", "validate_only=true", "resume=auto")
    assert again["val_loss"] == trained["val_loss"] != fresh["val_loss"]


def test_the_best_checkpoint_counts_the_last_validation(job, tmp_path):
    summary = job("run", "trainer.max_steps=9", "trainer.val_check_interval=1000")
    assert summary["val_loss"] < summary["initial_val_loss"]
    weights, last = (state(tmp_path / "run", name)[0] for name in ("best", "last"))
    assert all(torch.equal(weights[name], last[name]) for name in last)


@pytest.mark.parametrize(
    "settings, remedy",
    [
        (["strategy=ddp", "trainer.devices=2", "update=layerwise"], "strategy=fsdp"),
        (["trainer.devices=2", "callbacks=[default,auto_batch_size]"], "trainer.devices=1"),
        (["+trainer.limit_val_batches=0"], "data.max_val_examples"),
        (
            ["+trainer.limit_train_batches=0"],
            "limit_train_batches=0: the run would take no step.*val",
        ),
        (["trainer.max_steps=-1", "trainer.max_epochs=0"], "max_epochs=0: .*validate_only=true"),
        (["trainer.max_steps=0"], "max_steps=0: .*validate_only=true"),
        ([*LORA, "adapter.target_modules=[q_projj]"], r"adapter\.target_modules=\[q_proj\]"),
    ],
)
def test_what_fit_would_refuse_is_refused_before_a_model_loads(job, monkeypatch, settings, remedy):
    monkeypatch.setattr(Pretrained, "load_model", None)  # it is not called
    with pytest.raises(CompactHydraException, match=remedy):
        job("run", *settings)


def test_a_resumed_run_keeps_what_its_csv_logger_wrote(job, tmp_path):
    for end in (2, 4):
        options = ["resume=auto", "logger=csv", "trainer.log_every_n_steps=1"]
        job("run", f"trainer.max_steps={end}", *options)
    steps = []
    for version in ("version_0", "version_1"):
        with (tmp_path / "run" / "csv" / version / "metrics.csv").open() as file:
            steps += [int(row["step"]) for row in csv.DictReader(file) if row["train_loss"]]
    assert steps == [0, 1, 2, 3]


def test_the_batch_size_is_found_first_and_a_stop_comes_last():
    callbacks = [StopOnSignal(), MemoryMonitor(), AutoBatchSize()]
    ordered = [type(callback) for callback in sorted(callbacks, key=_turn)]
    assert ordered == [AutoBatchSize, MemoryMonitor, StopOnSignal]


class Mine(FSDP2Strategy):
    """A subclass without the letters that once decided."""


@pytest.mark.parametrize(
    ("strategy", "sharded"),
    [
        (FSDP2Strategy(), True),
        (Mine(), True),
        (TensorParallelStrategy(), True),
        (ModelParallelStrategy(), True),
        ("registered", True),
        ("fsdp", True),
        ("ddp", False),
        ("auto", False),
        (DDPStrategy(), False),
    ],
)
@pytest.mark.parametrize("bfloat16", [True, False])
def test_where_weights_are_sharded_they_are_float32(strategy, sharded, bfloat16, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bfloat16)
    monkeypatch.setitem(StrategyRegistry, "registered", {"strategy": Mine, "init_params": {}})
    wanted = {True: ("bf16-mixed", "32-true"), False: ("bf16-true", "16-mixed")}[sharded]
    assert sensible_precision("auto", strategy) == wanted[0 if bfloat16 else 1]
    assert sensible_precision("cpu", strategy) == "32-true"


def test_the_precision_that_was_chosen_is_in_the_summary(job):
    summary = job("run", "trainer.max_steps=1")
    assert summary["config"]["trainer"]["precision"] == "32-true"
    assert summary["config"]["trainer"].get("strategy", "auto") == "auto"


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_an_optimizer_that_needs_the_weight_is_refused_in_every_precision(precision, job, tmp_path):
    """Rounding wraps the class, and the wrapped one's traits count."""
    adafactor = ["optim._target_=torch.optim.Adafactor", "~optim.fused"]
    with pytest.raises(CompactHydraException, match="scales its step by the parameter's size"):
        job("run", "optim=galore_subspace", *adafactor, f"trainer.precision={precision}")
    assert not (tmp_path / "run" / "checkpoints").exists()
