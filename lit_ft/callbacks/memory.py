"""Show the memory in use in the logs and in the progress bar, and what it is used for."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lit_ft.callbacks._support.compiled import is_compiled
from lit_ft.callbacks._support.every_n_steps import EveryNSteps
from lit_ft.compat.ranges import Count, WholeNumber
from lit_ft.measure.live_memory import CATEGORIES
from lit_ft.measure.memory import current_bytes, is_out_of_memory, peak_bytes, reset_peak
from lit_ft.measure.memory_peaks import peaks_of
from lit_ft.measure.memory_picture import Limit, Phase, write_picture
from lit_ft.measure.memory_timeline import timeline
from lit_ft.measure.stretch_tracker import StretchTracker
from lit_ft.terminal.console import format_bytes

_GIB = 2**30
_PHASES = ("forward", "backward", "step", "validation")
_ALLOCATOR = "allocator"

log = logging.getLogger(__name__)


class MemoryMonitor(Callback):
    """Log the memory in use, and track what the first steps use it for if asked to.

    `memory/allocated` and `memory/peak` are in GiB, each the maximum over all ranks. The progress
    bar shows the peak as `peak GiB`. On devices whose peak can be reset, it counts from the start
    of training, so it does not include the loading of the model. What is measured depends on the
    device: see `lit_ft.measure.MemoryReading`.

    In the first `tracked_steps` steps, and in the first batch of a validation after them, every
    tensor is followed from its allocation to its release. The peaks of `forward`, `backward`,
    `step` and `validation` are logged in GiB as `memory_by_phase/PHASE/all` and
    `memory_by_phase/PHASE/CATEGORY`, where the category is `weights`, `gradients`, `optimizer`,
    `subspace`, `activations` or `temporaries`. On a CUDA GPU, `memory_by_phase/PHASE/allocator` is
    the peak that torch's allocator reports. It includes what was allocated before and is none of
    these tensors.

    A tracked step gives the same weights, bit for bit. It takes longer by the time that Python
    needs for each operation, whatever its size, and autograd adds up gradients in new memory
    instead of in place, which may take as much more as one activation. A compiled model is not
    tracked, because it would run uncompiled meanwhile. A phase that allocates nothing is left out,
    and so is what a custom kernel allocates for itself. Torch's counter of the peak
    (`torch.cuda.max_memory_allocated`) starts afresh with each phase of a tracked step.

    If a CUDA GPU runs out of memory, a snapshot of its memory is written to `folder`, which
    https://pytorch.org/memory_viz draws.

    Args:
        every_n_steps: The number of optimizer steps between readings; None uses the Trainer's
            `log_every_n_steps`.
        tracked_steps: The number of optimizer steps to track, counted from the first one of the
            fit; 0 tracks nothing. The first step makes the optimizer's state, and the second one
            has it from its start, so 2 are enough.
        folder: The folder for `memory.html`, which draws the last tracked step and the validation,
            and for `memory_snapshot_RANK.pickle`; None writes neither.
        snapshot_history: The number of the latest allocations and releases that a snapshot shows
            with the code that made them; 0 notes no code, which costs no time.

    Attributes:
        peaks: The bytes of each category at the peak of each tracked phase, on this rank and keyed
            by phase.
        allocator_peaks: The allocator's own peak bytes in each tracked phase on this rank; empty on
            devices other than CUDA GPUs.
        snapshot: The file with the memory of this rank when it ran out of it; None if it did not.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> monitor = MemoryMonitor(every_n_steps=1, tracked_steps=2)
        >>> trainer = L.Trainer(
        ...     callbacks=[monitor],
        ...     max_steps=2,
        ...     logger=False,
        ...     accelerator="cpu",
        ...     enable_checkpointing=False,
        ...     enable_progress_bar=False,
        ...     enable_model_summary=False,
        ... )
        >>> trainer.fit(BoringModel())
        >>> bool(trainer.callback_metrics["peak GiB"] > 0)
        True
        >>> monitor.peaks["backward"]["weights"], monitor.peaks["backward"]["gradients"]
        (264, 264)
    """

    def __init__(
        self,
        every_n_steps: Count | None = None,
        *,
        tracked_steps: WholeNumber = 0,
        folder: str | Path | None = None,
        snapshot_history: WholeNumber = 0,
    ) -> None:
        self._every_n = EveryNSteps(every_n_steps)
        self.tracked_steps = tracked_steps
        self.folder = folder
        self.snapshot_history = snapshot_history
        self.snapshot: Path | None = None
        self.peaks: dict[str, dict[str, int]] = {}
        self.allocator_peaks: dict[str, int] = {}
        self._tracker: StretchTracker | None = None
        self._left = 0  # steps to track
        self._began = self._micro_batches = self._step = 0
        self._validates = False  # in a stretch that is tracked
        self._phases: list[Phase] = []  # of the last tracked step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let torch note the code of allocations if asked to, those of the weights included."""
        self.snapshot = None
        if self._notes_code(trainer):
            torch.cuda.memory._record_memory_history(
                stacks="python", max_entries=self.snapshot_history
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare the tracking."""
        self.peaks, self.allocator_peaks, self._phases = {}, {}, []
        self._left = 0 if is_compiled(pl_module) else self.tracked_steps
        if self._left:
            # Before training starts, when callbacks that free gradients add their hooks.
            self._tracker = StretchTracker(pl_module, trainer.strategy.root_device)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting steps, and reset the peak."""
        self._every_n.start(trainer)
        reset_peak(trainer.strategy.root_device)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin to track a step, or go on with one that accumulates."""
        if self._tracker is None or self._left == 0:
            return
        if not self._tracker.is_on:
            self._tracker.begin(trainer, pl_module)
            self._began, self._micro_batches = trainer.global_step, 0
        self._tracker.follower.on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Tell the tracker."""
        if self._tracker is not None and self._tracker.is_on:
            self._tracker.follower.on_before_backward(trainer, pl_module, loss)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Tell the tracker."""
        if self._tracker is not None and self._tracker.is_on:
            self._tracker.follower.on_before_optimizer_step(trainer, pl_module, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log if the last tracked step ends, and if `every_n_steps` steps have passed."""
        if self._tracker is not None and self._tracker.is_on:
            follower = self._tracker.follower
            follower.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            self._end_step(self._tracker, trainer, pl_module)
        if not self._every_n.due(trainer):
            return
        device = trainer.strategy.root_device
        readings = [current_bytes(device).value, peak_bytes(device).value]
        allocated, peak = _highest(trainer, readings)
        self._log(trainer, {"memory/allocated": allocated, "memory/peak": peak})
        pl_module.log("peak GiB", peak, prog_bar=True, logger=False)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Track the first batch of the first validation after the tracked steps."""
        if self._tracker is not None and self._left == 0:
            self._tracker.begin(trainer, pl_module)
            self._tracker.follower.on_validation_start(trainer, pl_module)
            self._validates = True

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Log what the validation took, and track no more."""
        if self._tracker is not None and self._validates:
            self._tracker.follower.on_validation_end(trainer, pl_module)
            self._phases += self._note(self._tracker)
            self._stop()
            self._tell(trainer, pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Stop tracking, and write what a GPU held when its memory ran out."""
        self._stop()
        device = trainer.strategy.root_device
        if self.folder is not None and device.type == "cuda" and is_out_of_memory(exception):
            self._write_snapshot(trainer, Path(self.folder))
        self._note_no_code(trainer)  # Lightning calls no teardown after an error

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let torch note the code of allocations no longer."""
        self._note_no_code(trainer)

    def _notes_code(self, trainer: Trainer) -> bool:
        return self.snapshot_history > 0 and trainer.strategy.root_device.type == "cuda"

    def _note_no_code(self, trainer: Trainer) -> None:
        if self._notes_code(trainer):
            torch.cuda.memory._record_memory_history(enabled=None)

    def _write_snapshot(self, trainer: Trainer, folder: Path) -> None:
        file = folder / f"memory_snapshot_{trainer.global_rank}.pickle"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(file))  # type: ignore[no-untyped-call]
        except (OSError, RuntimeError) as error:  # the error of the run matters more
            log.warning("There is no snapshot of the memory: %s", error)
        else:
            self.snapshot = file
            log.warning("What the memory held is in %s.", file)

    def _end_step(self, tracker: StretchTracker, trainer: Trainer, module: LightningModule) -> None:
        """Note the peaks if a tracked step is complete, and log them if it is the last one."""
        self._micro_batches += 1
        # A module that optimizes manually may not step for a long time.
        most = trainer.accumulate_grad_batches
        if trainer.global_step == self._began and self._micro_batches < most:
            return
        self._left -= 1
        self._step = trainer.global_step
        self._phases = self._note(tracker)
        if self._left == 0:
            self._tell(trainer, module)

    def _stop(self) -> None:
        tracker, self._tracker, self._validates = self._tracker, None, False
        if tracker is not None:
            tracker.close()

    def _note(self, tracker: StretchTracker) -> list[Phase]:
        """End a tracked stretch, note its peaks, and return its phases."""
        events = tracker.end()
        found = peaks_of(events, 0).by_phase()
        for phase in _PHASES:
            if phase in found:
                highest = [self.peaks.get(phase, {}), found[phase]]
                self.peaks[phase] = max(highest, key=lambda held: sum(held.values()))
            if phase in tracker.allocator:
                taken = [self.allocator_peaks.get(phase, 0), tracker.allocator[phase]]
                self.allocator_peaks[phase] = max(taken)
        return [one for one in timeline(events) if one.name in _PHASES]

    def _tell(self, trainer: Trainer, module: LightningModule) -> None:
        """Log the peaks, and draw the phases."""
        figures = {
            f"memory_by_phase/{phase}/{use}": size
            for phase in _PHASES
            for use, size in self._figures(phase).items()
        }
        highest = dict(zip(figures, _highest(trainer, list(figures.values())), strict=True))
        self._log(trainer, {name: size for name, size in highest.items() if size})
        if self.folder is not None and trainer.is_global_zero:
            self._draw(Path(self.folder) / "memory.html", trainer, module)

    def _figures(self, phase: str) -> dict[str, int]:
        """Return all figures of a phase, the same ones on each rank."""
        held = self.peaks.get(phase, {})
        return {
            "all": sum(held.values()),
            _ALLOCATOR: self.allocator_peaks.get(phase, 0),
            **{category: held.get(category, 0) for category in CATEGORIES},
        }

    def _draw(self, file: Path, trainer: Trainer, module: LightningModule) -> None:
        device = trainer.strategy.root_device
        peak = max(sum(phase.highest.values()) for phase in self._phases)
        highest = max(sum(held.values()) for held in self.peaks.values())
        facts = {
            "module": type(module).__name__,
            "step": f"{self._step}, from left to right; each phase has its own scale of time",
            "peak": f"{format_bytes(peak)}; of all tracked steps {format_bytes(highest)}",
        }
        for phase, size in self.allocator_peaks.items():
            facts[f"allocator, {phase}"] = format_bytes(size)
        limit = None
        if device.type == "cuda":
            found = torch.cuda.get_device_properties(device)
            limit = Limit(found.name, found.total_memory)
        title = "The memory of a training step"
        write_picture(file, title, self._phases, facts=facts, limit=limit)

    def _log(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        # Lightning numbers logged steps from 0.
        for logger in trainer.loggers:
            logger.log_metrics(dict(metrics), step=trainer.global_step - 1)


def _highest(trainer: Trainer, sizes: list[int]) -> list[float]:
    """Return each number of bytes as GiB, the maximum over all ranks."""
    gib = torch.tensor(sizes, device=trainer.strategy.root_device).float() / _GIB
    largest: Any = trainer.strategy.reduce(gib, reduce_op="max")
    found: list[float] = largest.tolist()
    return found
