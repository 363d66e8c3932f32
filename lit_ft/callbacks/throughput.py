"""Measure the tokens per second of training alone, and the share of the device's peak rate."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_ft.callbacks._support.every_n_steps import EveryNSteps
from lit_ft.compat.ranges import Count, WholeNumber
from lit_ft.distributed.ranks import data_parallel_rank
from lit_ft.measure.batch_counts import BatchCounts, count_tokens, num_samples, sum_squared_lengths
from lit_ft.measure.flops import TrainingFlops, peak_flops, training_flops


class Stopwatch:
    """Adds up the seconds during which it runs, over several starts and stops."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started: float | None = None

    def start(self) -> None:
        """Start or continue; do nothing if it is running already."""
        if self._started is None:
            self._started = time.perf_counter()

    def stop(self, *, keep: bool = True) -> None:
        """Stop; with `keep=False`, discard the time since the last start."""
        if self._started is not None and keep:
            self.seconds += time.perf_counter() - self._started
        self._started = None


class ThroughputMonitor(Callback):
    """Log the speed of training under `throughput/`.

    `tokens_per_second`, `samples_per_second` and `step_seconds` cover the timed optimizer steps
    since the last log. Tokens and samples are summed over all ranks, and padding tokens do not
    count. `step_seconds` is the mean over the steps of rank 0. `mfu` is the model FLOPs utilisation
    (see `lit_ft.measure.flops`), with the output head counted for target tokens only. It is logged
    if the device's peak rate is known; `lit_ft.measure.flops.peak_flops` says how far to trust it.
    The progress bar shows `tok/s`.

    **What is timed.** The clock runs during the wait for data, the training step and the module's
    own hooks. It does not run during validation or other callbacks, such as checkpoints and
    generated samples. The hooks of callbacks run one after another, so the clock stops in the first
    callback and starts again in the last. For this, `setup` moves this callback to the front of
    `trainer.callbacks` and appends a second one that starts the clock. The time in which an epoch
    starts its data workers is included; the end of an epoch is not. The first `skip_steps`
    optimizer steps are not timed, because of allocation, autotuning and compilation. They count
    only in `tokens`.

    A GPU works asynchronously, and the CPU waits for it only before a log and before a validation.
    So the time of a single step on a GPU is approximate, but the sum between two logs is exact.

    Args:
        every_n_steps: The number of optimizer steps between two logs; None uses the Trainer's
            `log_every_n_steps`.
        skip_steps: The number of optimizer steps at the start of `fit` that are not timed.
        num_tokens: A function that takes a batch and returns its number of tokens. None uses
            `batch["num_tokens"]`; if that is absent, the sum of `batch["attention_mask"]`; and if
            both are absent, the size of `batch["input_ids"]`.

    Attributes:
        logged_at: The optimizer step at which the last log was due; None before the first one.

    Raises:
        MisconfigurationException: On the first batch, if its tokens cannot be counted.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> monitor = ThroughputMonitor(skip_steps=1, num_tokens=lambda batch: batch.numel())
        >>> trainer = L.Trainer(
        ...     callbacks=[monitor], max_steps=4, accelerator="cpu", barebones=True
        ... )
        >>> trainer.fit(BoringModel())  # batches of one row of 32
        >>> monitor.tokens
        128
    """

    def __init__(
        self,
        every_n_steps: Count | None = None,
        skip_steps: WholeNumber = 2,
        num_tokens: Callable[[Any], int] | None = None,
    ) -> None:
        self.skip_steps = skip_steps
        self.num_tokens = num_tokens
        self._every_n = EveryNSteps(every_n_steps)
        self._clock = Stopwatch()
        self._restart = _StartClock(self._clock)
        self._reset()

    def _reset(self) -> None:
        self._clock.stop(keep=False)
        self._seconds_at_step = self._clock.seconds = 0.0
        self._steps_to_skip = self.skip_steps
        self._step_seconds: list[float] = []
        self._logged_steps = 0  # the number of _step_seconds that are in the totals
        self._step = BatchCounts()  # of the current optimizer step
        self._skipped = BatchCounts()  # of the untimed steps since the last log
        self._window = BatchCounts()  # of the timed steps since the last log
        self._timed_total = self._skipped_total = BatchCounts()
        self._shares = 1
        self.logged_at: int | None = None
        self._flops: TrainingFlops | None = None
        self._peak_flops: float | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """The timed tokens of all ranks per second of training; None if no step was timed."""
        return self._timed_total.tokens / self._timed_seconds if self._logged_steps else None  # type: ignore[return-value]

    @property
    def step_seconds(self) -> dict[str, float | None]:
        """The median, 95th percentile and maximum seconds of this rank's timed optimizer steps."""
        if not self._step_seconds:
            return {"median": None, "p95": None, "max": None}
        seconds = torch.tensor(self._step_seconds, dtype=torch.float64)
        return {
            "median": seconds.quantile(0.5).item(),
            "p95": seconds.quantile(0.95).item(),
            "max": seconds.max().item(),
        }

    @property
    def tokens(self) -> int:
        """The number of tokens of all ranks in this `fit`, with the first `skip_steps` steps."""
        return int(self._timed_total.tokens + self._skipped_total.tokens)

    @property
    def tokens_so_far(self) -> int:
        """The number of tokens of all ranks up to this moment, without asking the other ranks.

        Since the last log, each rank counts as many as this one.
        """
        since = self._window.tokens + self._skipped.tokens + self._step.tokens
        return self.tokens + self._shares * int(since)

    @property
    def training_seconds(self) -> float:
        """The seconds of training in this `fit`, with the first `skip_steps` steps."""
        return self._clock.seconds

    @property
    def _timed_seconds(self) -> float:
        return sum(self._step_seconds[: self._logged_steps])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the first place among the callbacks, and put the clock's starter in the last."""
        if stage == "fit":
            callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
            callbacks.remove(self)
            callbacks.insert(0, self)
            callbacks.append(self._restart)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the callback that `setup` has appended."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if self._restart in callbacks:
            callbacks.remove(self._restart)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the counts, and look up the device's peak rate and the model's FLOPs."""
        self._reset()
        self._every_n.start(trainer)
        self._global_step = trainer.global_step
        _, self._shares = data_parallel_rank(trainer)
        device = trainer.strategy.root_device
        self._peak_flops = peak_flops(device, _compute_dtype(trainer, pl_module))
        if self._peak_flops is not None:
            self._flops = training_flops(getattr(pl_module, "model", pl_module))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch before the training step can change it."""
        self._clock.stop()
        self._step += self._work(batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the optimizer step if this batch completed one, and log if a log is due."""
        due = self._every_n.due(trainer)
        if due:
            _wait_for(trainer.strategy.root_device)
        self._clock.stop()
        if trainer.global_step > self._global_step:
            self._global_step = trainer.global_step
            self._close_step()
        if due:
            self._log(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock, and discard the time since the last batch, which prepared validation."""
        self._clock.stop(keep=False)
        if not trainer.sanity_checking:
            self._clock.start()
            _wait_for(trainer.strategy.root_device)  # a training step may still be running
            self._clock.stop()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock until the next epoch."""
        self._clock.stop(keep=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the totals of all ranks up to date."""
        self._clock.stop(keep=False)
        self._gather(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Bring the totals up to date if there is one process; other ranks may have ended."""
        self._clock.stop(keep=False)
        self.teardown(trainer, pl_module, "fit")
        if trainer.world_size == 1 and trainer.state.fn == "fit":
            self._gather(trainer)

    def _close_step(self) -> None:
        seconds = self._clock.seconds - self._seconds_at_step
        self._seconds_at_step = self._clock.seconds
        if self._steps_to_skip > 0:
            self._steps_to_skip -= 1
            self._skipped += self._step
        else:
            self._step_seconds.append(seconds)
            self._window += self._step
        self._step = BatchCounts()

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.logged_at = trainer.global_step
        seconds = self._step_seconds[self._logged_steps :]
        work = self._gather(trainer)
        if not seconds:
            return
        metrics = {
            "throughput/tokens_per_second": work.tokens / sum(seconds),
            "throughput/samples_per_second": work.samples / sum(seconds),
            "throughput/step_seconds": sum(seconds) / len(seconds),
        }
        if self._flops is not None and self._peak_flops is not None:
            peak = self._peak_flops * trainer.world_size
            metrics["throughput/mfu"] = _flops_of(work, self._flops) / sum(seconds) / peak
        for logger in trainer.loggers:
            # Lightning numbers logged steps from 0.
            logger.log_metrics(metrics, step=trainer.global_step - 1)  # type: ignore[arg-type]
        pl_module.log("tok/s", metrics["throughput/tokens_per_second"], prog_bar=True, logger=False)

    def _gather(self, trainer: Trainer) -> BatchCounts:
        """Add the counts of all ranks since the last log to the totals; return the timed ones."""
        local = [*vars(self._window).values(), *vars(self._skipped).values()]
        device = trainer.strategy.root_device
        counts = torch.stack([torch.as_tensor(n, dtype=torch.int64, device=device) for n in local])
        sums: Any = trainer.strategy.reduce(counts, reduce_op="sum")
        _, shares = data_parallel_rank(trainer)
        sums = sums // (trainer.world_size // shares)  # tensor-parallel ranks count the same
        window, skipped = BatchCounts(*sums[:4].tolist()), BatchCounts(*sums[4:].tolist())
        self._timed_total += window
        self._skipped_total += skipped
        self._window, self._skipped = BatchCounts(), BatchCounts()
        self._logged_steps = len(self._step_seconds)
        return window

    def _work(self, batch: Any) -> BatchCounts:
        tokens = count_tokens(batch) if self.num_tokens is None else self.num_tokens(batch)
        if self._peak_flops is None or not isinstance(batch, Mapping):
            return BatchCounts(tokens, samples=num_samples(batch))
        targets = batch.get("num_targets", tokens)
        return BatchCounts(tokens, targets, sum_squared_lengths(batch), num_samples(batch))


class _StartClock(Callback):
    """The last callback, whose hooks start the clock because training continues after them."""

    def __init__(self, clock: Stopwatch) -> None:
        self._clock = clock

    def on_train_epoch_start(self, *_: Any) -> None:
        self._clock.start()

    def on_train_batch_start(self, *_: Any) -> None:
        self._clock.start()

    def on_train_batch_end(self, *_: Any) -> None:
        self._clock.start()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._clock.start()


def _flops_of(work: BatchCounts, flops: TrainingFlops) -> int:
    return flops.of(
        num_tokens=int(work.tokens),
        num_targets=int(work.targets),
        sum_squared_lengths=int(work.squared_lengths),
    )


def _compute_dtype(trainer: Trainer, pl_module: LightningModule) -> torch.dtype:
    """Return the dtype of the matrix products, from the trainer's precision or else the weights."""
    if str(trainer.precision).startswith("bf16"):
        return torch.bfloat16
    if str(trainer.precision).startswith("16"):
        return torch.float16
    floats = (p.dtype for p in pl_module.parameters() if p.is_floating_point())
    return next(floats, torch.float32)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
