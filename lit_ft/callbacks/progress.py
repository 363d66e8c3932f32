"""Show how far a run is: one live line in a terminal, plain lines in a file."""

from __future__ import annotations

import math
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from lit_ft.callbacks._support.every_n_steps import EveryNSteps
from lit_ft.callbacks._support.trainer import total_steps
from lit_ft.compat.ranges import Count, NonNegative
from lit_ft.terminal import LiveLine, display, resolved
from lit_ft.terminal.console import console, format_duration, separator

_MEASURED = 4  # steps until a run says how long it takes; the first one is slower than the others
_LONG = 60.0  # seconds; a shorter rest is not worth a line


class ProgressBar(LightningProgressBar):
    """Show the step, metrics logged with `prog_bar=True`, the learning rate and the time left.

    `ProgressBar()` makes a `TerminalProgress` if stdout is a terminal, and a `LineProgress`
    otherwise, just as `pathlib.Path()` picks the class for the operating system. Both show

    `step 20/100 · loss 2.413 · 1,234 tok/s · 3.1 GiB · lr 1.0e-04 · eta 1:20`

    for the whole run, over all its epochs, and print the result of each validation on a line of
    its own. The learning rate is the one of the step that is shown. If more than a minute is left
    after the first four steps, a line says once how long the run takes at their rate.

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
            is_live = isinstance(display(), LiveLine) or resolved("auto") == "rich"
            cls = TerminalProgress if is_live else LineProgress
        return super().__new__(cls)

    def __init__(
        self, every_n_steps: Count | None = None, every_n_seconds: NonNegative = 30.0
    ) -> None:
        super().__init__()
        self._every_n = EveryNSteps(every_n_steps)
        self._every_n_seconds = every_n_seconds
        self._enabled = not console().quiet
        self._first_step = 0
        self._started_at = time.monotonic()
        self._lr: float | None = None
        self._first_ended_at: float | None = None

    def disable(self) -> None:
        """Show nothing; the Trainer calls this on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show progress again after `disable`."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print a line and flush it at once, so that it also shows when stdout is a pipe."""
        if self._enabled:
            print(*args, **{"flush": True, **kwargs})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock and the count of steps, from which the remaining time is computed."""
        self._every_n.start(trainer)
        self._first_step = trainer.global_step
        self._started_at = time.monotonic()
        self._first_ended_at = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the learning rate of the coming step: at its end there is already the next one."""
        self._lr = _learning_rate(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show how far the validation is; `LineProgress` does so every `every_n_seconds`."""
        self.has_dataloader_changed(dataloader_idx)
        total = self.total_val_batches_current_dataloader
        of_all = f"/{total:,}" if total < math.inf else ""
        self._show_validation(f"validation {batch_idx + 1:,}{of_all}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the metrics of the validation."""
        if not trainer.sanity_checking:
            metrics = self.get_metrics(trainer, pl_module)
            found = {name: value for name, value in metrics.items() if name.startswith("val")}
            self.print(
                separator().join([f"validation at step {trainer.global_step}", *_facts(found)])
            )
        self.reset_dataloader_idx_tracker()

    def _training_facts(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        step, total = trainer.global_step, total_steps(trainer)
        facts = [f"step {step:,}/{total:,}" if math.isfinite(total) else f"step {step:,}"]
        metrics = self.get_metrics(trainer, pl_module)
        facts += _facts({n: value for n, value in metrics.items() if not n.startswith("val")})
        if self._lr is not None:
            facts.append(f"lr {self._lr:.1e}")
        done = step - self._first_step
        if done and math.isfinite(total):
            seconds = (total - step) * (time.monotonic() - self._started_at) / done
            facts.append(f"eta {format_duration(seconds)}")
        return facts

    def _say_length(self, trainer: Trainer) -> None:
        """Print once how long the run takes, when its first steps have shown how fast it is."""
        now, done = time.monotonic(), trainer.global_step - self._first_step
        if done == 1 and self._first_ended_at is None:
            self._first_ended_at = now
        if done < _MEASURED or self._first_ended_at is None:
            return
        step_seconds, self._first_ended_at = (now - self._first_ended_at) / (done - 1), None
        left = total_steps(trainer) - trainer.global_step
        if math.isfinite(left) and left * step_seconds > _LONG:
            self.print(
                f"about {format_duration(left * step_seconds)} for the {left:,} steps that are "
                f"left, at the rate of the first {done}, and more for validations"
            )

    def _show_validation(self, fact: str) -> None:
        """Show how far the validation is."""


class TerminalProgress(ProgressBar):
    """Show one line for the whole run at the bottom of the terminal.

    What the process prints meanwhile appears above the line, which is gone at the end. Reading a
    metric waits for the GPU, so values are read at most twice a second.

    Args:
        every_n_steps: Ignored, because the line shows every step. It is accepted so that the
            arguments are those of `LineProgress`.
        every_n_seconds: Ignored, for the same reason.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[TerminalProgress()], logger=False, accelerator="cpu")
    """

    def __init__(
        self, every_n_steps: Count | None = None, every_n_seconds: NonNegative = 30.0
    ) -> None:
        super().__init__(every_n_steps, every_n_seconds)
        shared = display()
        self._line = shared if isinstance(shared, LiveLine) else LiveLine()
        self._read_at = -math.inf

    def disable(self) -> None:
        """Show nothing, and remove the line."""
        super().disable()
        self._line.progress(())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the line, before the first step is done."""
        super().on_train_start(trainer, pl_module)
        self._lr = _learning_rate(trainer)
        self._read_at = -math.inf
        self._show_training(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Bring the line up to date."""
        self._say_length(trainer)
        self._show_training(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show that the validation begins."""
        self._show(["validation"])

    def _show_validation(self, fact: str) -> None:
        self._show([fact])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the metrics of the validation, and show the training again."""
        super().on_validation_end(trainer, pl_module)
        self._show([])
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._read_at = -math.inf
            self._show_training(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the last state of the training in the terminal, and remove the line."""
        self._line.progress(())
        self.print(separator().join(self._training_facts(trainer, pl_module)))

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Remove the line."""
        self._line.progress(())

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the line."""
        self._line.progress(())

    def _show_training(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._enabled and time.monotonic() - self._read_at > 0.5:
            self._read_at = time.monotonic()
            self._show(self._training_facts(trainer, pl_module))

    def _show(self, facts: list[str]) -> None:
        if self._enabled:
            self._line.progress(facts)


class LineProgress(ProgressBar):
    """Print one plain line every few steps, for files and CI.

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
        step 2/4 · lr 1.0e-01 · eta ...
        step 4/4 · lr 1.0e-01 · eta 0:00
    """

    def __init__(
        self, every_n_steps: Count | None = None, every_n_seconds: NonNegative = 30.0
    ) -> None:
        super().__init__(every_n_steps, every_n_seconds)
        self._printed_at = time.monotonic()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print a line, and note the time."""
        super().print(*args, **kwargs)
        self._printed_at = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print if `every_n_steps` or `every_n_seconds` have passed, and at the last step."""
        self._say_length(trainer)
        is_last = trainer.global_step == total_steps(trainer)
        if self._every_n.due(trainer) or is_last or self._is_overdue():
            self.print(separator().join(self._training_facts(trainer, pl_module)))

    def _show_validation(self, fact: str) -> None:
        if self._is_overdue():
            self.print(fact)

    def _is_overdue(self) -> bool:
        return time.monotonic() - self._printed_at >= self._every_n_seconds


def _facts(metrics: dict[str, Any]) -> list[str]:
    """Return `name value` for each metric; for lit_ft's own metrics, the value and its unit.

    These come last and in the same order, no matter when they are logged for the first time.
    """
    own = {name: metrics[name] for name in ("tok/s", "peak GiB") if name in metrics}
    others = {name: value for name, value in metrics.items() if name not in own}
    facts = []
    for name, value in (others | own).items():
        if name == "v_num" or not isinstance(value, int | float):
            continue
        if name == "tok/s":
            facts.append(f"{value:,.0f} tok/s")
        elif name == "peak GiB":
            facts.append(f"{value:.1f} GiB" if value >= 1 else f"{value * 1024:.0f} MiB")
        else:
            facts.append(f"{name.removeprefix('train_')} {value:.4g}")
    return facts


def _learning_rate(trainer: Trainer) -> float | None:
    """Return the first group's learning rate; None if it has none (Adafactor)."""
    groups = (group for optimizer in trainer.optimizers for group in optimizer.param_groups)
    lr = next(groups, {}).get("lr")
    return None if lr is None else float(lr)
