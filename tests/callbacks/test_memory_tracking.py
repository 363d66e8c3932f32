"""What the memory of a step is for: it agrees with the plan, and changes no training."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from lightning.pytorch import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim import SGD, AdamW

from lit_ft.callbacks import GaLore, LayerwiseUpdate, MemoryMonitor
from lit_ft.measure.memory import peak_bytes, reset_peak, take_peak
from lit_ft.optim import RowwiseAdamW8bit
from lit_ft.run.arguments import composed
from lit_ft.run.fake_run import plan_run
from lit_ft.subspace.projectors import Oja
from tests.support.planned_fit import SMALL, planned_fit
from tests.support.tiny_module import batch_of, loader, module_of, trainer_of

BATCHES = [batch_of([12, 5, 7], seed=seed) for seed in range(4)]
BATCH = torch.arange(2) % 10
NAMES = ["forward", "backward", "step", "validation"]


def tracked(arguments: list[str]) -> MemoryMonitor:
    """Run the fit that a plan is made of on real tensors, and return its monitor."""
    trainer, fit = planned_fit(arguments)
    monitor = MemoryMonitor(tracked_steps=2)
    trainer.callbacks.append(monitor)
    fit()
    return monitor


@pytest.mark.parametrize(
    "arguments",
    [
        ["optim=adamw"],
        ["optim=adamw", "update=layerwise", "trainer.gradient_clip_val=null"],
        ["optim=galore_subspace", "galore.rank=16", "trainer.accumulate_grad_batches=2"],
    ],
    ids=" ".join,
)
def test_it_agrees_with_the_plan_of_the_same_run(arguments):
    arguments = [*SMALL, *arguments]
    monitor = tracked(arguments)
    plan = plan_run(composed(arguments), device_type="cpu")
    assert set(monitor.peaks) == {"forward", "backward", "step", "validation"}
    found = {phase: sum(held.values()) for phase, held in monitor.peaks.items()}
    if "galore" in " ".join(arguments):
        found.pop("validation")  # the plan's highest is the one after training
    else:
        assert max(found.values()) == pytest.approx(plan.peak_bytes, rel=0.01)
    for phase, nbytes in found.items():
        held = plan.by_phase[phase]
        assert nbytes == pytest.approx(sum(held.values()), rel=0.01), phase
        for category, size in monitor.peaks[phase].items():
            assert size == pytest.approx(held[category], abs=0.01 * nbytes), (phase, category)


def trained(folder, monitor, *later, **options):
    """Return what a fit of three steps leaves behind."""
    module_options = {name: options.pop(name) for name in ("optimizer",) if name in options}
    module = module_of(**module_options)
    callbacks = [*options.pop("callbacks", []), monitor, *later]
    trainer = trainer_of(
        folder, callbacks=callbacks, **{"max_steps": 3, "val_check_interval": 1, **options}
    )
    trainer.fit(module, loader(*BATCHES * 2), loader(*BATCHES[:2]))
    states = trainer.optimizers[0].state_dict()["state"]
    return {"weights": module.state_dict(), "states": states}


@pytest.mark.parametrize(
    "options",
    [
        lambda: {"optimizer": partial(AdamW, lr=1e-2), "gradient_clip_val": 0.5},
        lambda: {"optimizer": partial(AdamW, lr=1e-2), "callbacks": [LayerwiseUpdate()]},
        lambda: {
            "optimizer": partial(AdamW, lr=1e-2),
            "callbacks": [GaLore(4, Oja(every=1)), LayerwiseUpdate()],
            "precision": "bf16-true",
        },
        lambda: {"optimizer": partial(RowwiseAdamW8bit, lr=1e-2), "accumulate_grad_batches": 2},
        lambda: {"optimizer": partial(AdamW8bit, lr=1e-2, min_8bit_size=64)},
    ],
    ids=["clipped", "layerwise", "galore, layerwise, bf16", "accumulated", "bitsandbytes"],
)
def test_tracked_steps_train_the_same_weights_bit_for_bit(options, tmp_path):
    plain = trained(tmp_path, MemoryMonitor(tracked_steps=0), **options())
    monitor = MemoryMonitor(tracked_steps=2)
    seen = trained(tmp_path, monitor, **options())
    assert monitor.peaks["step"]["weights"] > 0
    torch.testing.assert_close(seen, plain, rtol=0, atol=0)


class Modes(Callback):
    """Notes how many modes each forward pass runs under."""

    def __init__(self):
        self.training, self.validation = [], []

    def on_before_backward(self, trainer, pl_module, loss):
        self.training.append(torch._C._len_torch_dispatch_stack())

    def on_validation_batch_start(self, *_):
        self.validation.append(torch._C._len_torch_dispatch_stack())


def test_the_first_steps_and_one_batch_of_a_validation_are_tracked(tmp_path):
    modes = Modes()
    trained(
        tmp_path,
        MemoryMonitor(tracked_steps=1),
        modes,
        accumulate_grad_batches=2,
        num_sanity_val_steps=2,
    )
    assert modes.training == [2, 2, 0, 0, 0, 0]
    # Two before training, two inside the tracked step, and one after it.
    assert modes.validation[:8] == [0, 0, 2, 2, 2, 0, 0, 0]


def test_an_error_in_a_tracked_step_ends_the_tracking(tmp_path):
    class Broken(BoringModel):
        def training_step(self, batch, batch_idx):
            raise OSError("the disk is full")

    resize = torch.UntypedStorage.resize_
    with pytest.raises(OSError, match="disk"):
        trainer_of(tmp_path, callbacks=[MemoryMonitor(tracked_steps=2)]).fit(Broken())
    assert torch._C._len_torch_dispatch_stack() == 0
    assert torch.UntypedStorage.resize_ is resize


def test_a_compiled_module_is_not_tracked(tmp_path):
    monitor = MemoryMonitor(tracked_steps=2)
    module = BoringModel()
    module.layer = torch.compile(module.layer, backend="eager")
    trainer_of(tmp_path, callbacks=[monitor]).fit(module)
    assert monitor.peaks == {}


def test_sparse_gradients_and_several_ways_to_step_are_tracked(tmp_path):
    class Sparse(BoringModel):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.table = nn.Embedding(10, 32, sparse=True)

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            loss = self.layer(batch + self.table.weight.new_ones(()) * self.table(BATCH)).sum()
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()

        def configure_optimizers(self):
            return SGD(self.parameters(), lr=0.1)

    monitor = MemoryMonitor(tracked_steps=2)
    trainer_of(tmp_path, callbacks=[monitor]).fit(Sparse())
    assert monitor.peaks["forward"]["weights"] == 4 * (32 * 2 + 2 + 10 * 32)


def test_the_peaks_are_logged_and_drawn(tmp_path):
    logger = CSVLogger(tmp_path)
    monitor = MemoryMonitor(tracked_steps=2, folder=tmp_path / "run")
    trained(tmp_path, monitor, logger=logger, optimizer=partial(AdamW, lr=1e-2))
    logger.finalize("success")
    with open(logger.experiment.metrics_file_path) as file:
        logged = {k: float(v) for row in csv.DictReader(file) for k, v in row.items() if v}
    held = monitor.peaks["step"]
    for use in ("weights", "gradients", "optimizer"):
        gib = logged[f"memory_by_phase/step/{use}"]
        assert gib == pytest.approx(held[use] / 2**30)
    assert logged["memory_by_phase/step/all"] == pytest.approx(sum(held.values()) / 2**30)
    assert logged["memory_by_phase/validation/all"] > 0
    assert "memory_by_phase/step/allocator" not in logged
    page = (tmp_path / "run" / "memory.html").read_text()
    assert [name for name in NAMES if f"<tr><th>{name}<" in page] == NAMES


def test_the_allocators_peak_is_taken_for_each_phase_and_not_forgotten(monkeypatch):
    peaks = iter([5, 9, 7, 3])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: next(peaks))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    gpu = torch.device("cuda", 0)
    assert [take_peak(gpu), take_peak(gpu)] == [5, 9]
    assert peak_bytes(gpu).value == 9
    reset_peak(gpu)
    assert peak_bytes(gpu).value == 3


@pytest.mark.parametrize(
    ("error", "device", "written"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "cuda", True),
        (torch.OutOfMemoryError("CUDA out of memory"), "cpu", False),
        (KeyboardInterrupt(), "cuda", False),
    ],
)
def test_a_gpu_that_runs_out_of_memory_leaves_a_snapshot(
    error, device, written, tmp_path, monkeypatch
):
    memory, noted = torch.cuda.memory, []
    monkeypatch.setattr(memory, "_record_memory_history", lambda **options: noted.append(options))
    monkeypatch.setattr(memory, "_dump_snapshot", lambda file: Path(file).write_bytes(b"held"))
    strategy = SimpleNamespace(root_device=torch.device(device))
    trainer: Any = SimpleNamespace(strategy=strategy, global_rank=3)
    monitor = MemoryMonitor(folder=tmp_path / "run", snapshot_history=10)
    monitor.setup(trainer, BoringModel(), "fit")
    monitor.on_exception(trainer, BoringModel(), error)
    file = tmp_path / "run" / "memory_snapshot_3.pickle"
    assert monitor.snapshot == (file if written else None)
    assert file.exists() is written
    # What torch notes for one training does not slow down what the process does afterwards.
    asked = [{"stacks": "python", "max_entries": 10}, {"enabled": None}]
    assert noted == (asked if device == "cuda" else [])


def test_a_snapshot_that_cannot_be_written_does_not_hide_the_error(tmp_path, monkeypatch):
    strategy = SimpleNamespace(root_device=torch.device("cuda"))
    trainer: Any = SimpleNamespace(strategy=strategy, global_rank=0)
    (tmp_path / "file").write_text("in the way")
    monitor = MemoryMonitor(folder=tmp_path / "file")
    monitor.on_exception(trainer, BoringModel(), torch.OutOfMemoryError("CUDA out of memory"))
    assert monitor.snapshot is None
