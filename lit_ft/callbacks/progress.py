"""Show progress: a live bar in a terminal, plain lines in a file."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from lightning.pytorch.callbacks import RichProgressBar

from lit_ft.callbacks._support.every_n_steps import EveryNSteps
from lit_ft.compat.ranges import Count, NonNegative


class ProgressBar(LightningProgressBar):
    """Show steps, metrics logged with `prog_bar=True`, the learning rate and the remaining time.

    `ProgressBar()` makes a `TerminalProgress` if stdout is a terminal, and a `LineProgress`
    otherwise, just as `pathlib.Path()` picks the class for the operating system.

    Args:
        every_n_steps: The number of optimizer steps between two lines of `LineProgress`; None uses
            the Trainer's `log_every_n_steps`. A `TerminalProgress` ignores it and shows every
            batch.
        every_n_seconds: The longest time in seconds between two lines of `LineProgress`, rounded up
            to the end of a batch, in training and in validation. A `TerminalProgress` ignores it.

    Example:
        >>> import lightning as L
        >>> progress = ProgressBar(every_n_steps=10)
        >>> trainer = L.Trainer(callbacks=[progress], logger=False, accelerator="cpu")
        >>> type(progress).__name__  # stdout is no terminal here
        'LineProgress'
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> ProgressBar:
        """Make an object of the class that suits stdout."""
        if cls is ProgressBar:
            cls = TerminalProgress if sys.stdout.isatty() else LineProgress
        return super().__new__(cls)

    def __init__(
        self, every_n_steps: Count | None = None, every_n_seconds: NonNegative = 30.0
    ) -> None:
        super().__init__()
        self._every_n = EveryNSteps(every_n_steps)
        self._every_n_seconds = every_n_seconds


class TerminalProgress(ProgressBar, RichProgressBar):
    """Lightning's rich progress bar, which here ends at `max_steps` and shows the learning rate.

    Reading a metric waits for the GPU, so values are read at most twice a second.

    Args:
        every_n_steps: Ignored, because the bar shows every batch. It is accepted so that the
            arguments are those of `LineProgress`.
        every_n_seconds: Ignored, for the same reason.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[TerminalProgress()], logger=False, accelerator="cpu")
    """

    def __init__(
        self, every_n_steps: Count | None = None, every_n_seconds: NonNegative = 30.0
    ) -> None:
        RichProgressBar.__init__(self)
        self._read_at = -math.inf
        self._metrics: dict[str, Any] = {}

    @property
    def total_train_batches(self) -> int | float:
        """The number of batches that this epoch trains on; `max_steps` may end it early."""
        trainer = self.trainer
        if trainer.max_steps == -1:
            return trainer.num_training_batches
        steps = trainer.max_steps - trainer.global_step
        return min(trainer.num_training_batches, steps * trainer.accumulate_grad_batches)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return the values to show, at most half a second old."""
        if time.monotonic() - self._read_at > 0.5:
            self._metrics = super().get_metrics(trainer, pl_module)
            self._metrics.pop("v_num", None)
            if "tok/s" in self._metrics:
                self._metrics["tok/s"] = f"{self._metrics['tok/s']:,.0f}"
            lr = _learning_rate(trainer)
            if lr is not None:
                self._metrics["lr"] = f"{lr:.1e}"
            self._read_at = time.monotonic()
        return self._metrics

    def _get_train_description(self, current_epoch: int) -> str:
        # If max_epochs is not set, it is -1, and Lightning shows "Epoch 2/-2".
        described = super()._get_train_description(current_epoch)
        return described.replace("/-2", "")


class LineProgress(ProgressBar):
    """Print one plain line every few steps, for files and CI.

    `step 20/100  loss 2.413  1,234 tok/s  3.1 GiB  lr 1.0e-04  eta 1m20s`

    Args:
        every_n_steps: The number of optimizer steps between two lines; None uses the Trainer's
            `log_every_n_steps`.
        every_n_seconds: The longest time in seconds between two lines, rounded up to the end of a
            batch, in training and in validation.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> trainer = L.Trainer(
        ...     callbacks=[LineProgress(every_n_steps=2)],
        ...     max_steps=4,
        ...     limit_val_batches=0,
        ...     logger=False,
        ...     accelerator="cpu",
        ...     enable_checkpointing=False,
        ...     enable_model_summary=False,
        ... )
        >>> trainer.fit(BoringModel())  # doctest: +ELLIPSIS
        step 2/4  lr 1.0e-01  eta ...s
        step 4/4  lr 1.0e-01  eta 0s
    """

    def __init__(
        self, every_n_steps: Count | None = None, every_n_seconds: NonNegative = 30.0
    ) -> None:
        super().__init__(every_n_steps, every_n_seconds)
        self._enabled = True
        self._printed_at = self._started_at = time.monotonic()
        self._first_step = 0

    def disable(self) -> None:
        """Stop printing; the Trainer calls this on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Print again after `disable`."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print a line and flush it at once, so that it also shows when stdout is a pipe."""
        if self._enabled:
            print(*args, **{"flush": True, **kwargs})
        self._printed_at = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock and the count of steps, from which the remaining time is computed."""
        self._every_n.start(trainer)
        self._first_step = trainer.global_step
        self._started_at = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print if `every_n_steps` or `every_n_seconds` have passed, and at the last step."""
        step, total = trainer.global_step, _total_steps(trainer)
        if self._every_n.due(trainer) or step == total or self._is_overdue():
            parts = [f"step {step}/{total:,}" if math.isfinite(total) else f"step {step}"]
            parts += _formatted(self.get_metrics(trainer, pl_module))
            lr, eta = _learning_rate(trainer), self._remaining_seconds(step, total)
            parts += [f"lr {lr:.1e}"] if lr is not None else []
            parts += [f"eta {format_seconds(eta)}"] if eta is not None else []
            self.print("  ".join(parts))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Print how far a long validation is, if `every_n_seconds` have passed."""
        if self._is_overdue():
            self.has_dataloader_changed(dataloader_idx)
            total = self.total_val_batches_current_dataloader
            self.print(f"validation {batch_idx + 1}" + (f"/{total}" if total < math.inf else ""))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the metrics of the validation."""
        if not trainer.sanity_checking:
            metrics = self.get_metrics(trainer, pl_module)
            found = {name: value for name, value in metrics.items() if name.startswith("val")}
            self.print("  ".join([f"validation at step {trainer.global_step}", *_formatted(found)]))
        self.reset_dataloader_idx_tracker()

    def _is_overdue(self) -> bool:
        return time.monotonic() - self._printed_at >= self._every_n_seconds

    def _remaining_seconds(self, step: int, total: float) -> float | None:
        done = step - self._first_step
        if done == 0 or not math.isfinite(total):
            return None
        return (total - step) * (time.monotonic() - self._started_at) / done


def format_seconds(seconds: float) -> str:
    """Return a time in seconds as readable text.

    >>> format_seconds(9), format_seconds(80), format_seconds(3700)
    ('9s', '1m20s', '1h01m')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def _formatted(metrics: dict[str, Any]) -> list[str]:
    """Return `name value` for each metric; for lit_ft's own metrics, the value and its unit."""
    parts = []
    for name, value in metrics.items():
        if name == "v_num" or not isinstance(value, int | float):
            continue
        if name == "tok/s":
            parts.append(f"{value:,.0f} tok/s")
        elif name == "peak GiB":
            parts.append(f"{value:.1f} GiB")
        else:
            parts.append(f"{name.removeprefix('train_')} {value:.4g}")
    return parts


def _learning_rate(trainer: Trainer) -> float | None:
    """Return the first group's learning rate; None if it has none (Adafactor)."""
    groups = (group for optimizer in trainer.optimizers for group in optimizer.param_groups)
    lr = next(groups, {}).get("lr")
    return None if lr is None else float(lr)


def _total_steps(trainer: Trainer) -> float:
    return trainer.max_steps if trainer.max_steps != -1 else trainer.estimated_stepping_batches
