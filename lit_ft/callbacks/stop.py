"""End a run on Ctrl-C, SIGTERM, SIGHUP or a scheduler's warning without losing anything."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_ft.callbacks._support.trainer import callbacks_of
from lit_ft.callbacks.checkpoint import LastCheckpoint

_HANGUP: Any = getattr(signal, "SIGHUP", None)  # these two are missing on Windows
_WARNING: Any = getattr(signal, "SIGUSR2", None)


class SIGHUPException(SIGTERMException):
    """The exception for a SIGHUP, which the terminal sends when it goes; it ends Lightning's run.

    Lightning knows SIGTERM alone. The exit code that a shell expects is another one.
    """


class StopOnSignal(Callback):
    """On a signal, finish the current optimizer step, save `LastCheckpoint`'s file, and stop.

    Without this callback, Lightning stops within a step on Ctrl-C and after any micro-batch on
    SIGTERM, and saves nothing. With it, only a second signal, or a signal outside `fit`, stops the
    run at once. All ranks stop at the same step, even if only one of them got the signal. The
    callback works only in the main thread, because Python allows signal handlers nowhere else.

    SIGHUP, which comes when the terminal or the connection to the machine is gone, is handled like
    SIGTERM, unless `nohup` or another caller has chosen to ignore it.

    SIGUSR2 is handled in the same way, if it has a handler when training starts. This is for jobs
    that submitit starts under Slurm. Slurm sends SIGUSR2 shortly before the job's time limit, and
    submitit's handler queues the job again. The callback runs that handler after it has saved.

    Raises:
        KeyboardInterrupt: After Ctrl-C; Lightning turns it into SystemExit.
        SIGTERMException: After SIGTERM, and after SIGUSR2 if its handler returns.
        SIGHUPException: After SIGHUP.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(
        ...     callbacks=[LastCheckpoint("checkpoints"), StopOnSignal()],
        ...     logger=False,
        ...     accelerator="cpu",
        ... )
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._on_warning: Any = None  # the handler that SIGUSR2 had before
        self._global_step = 0
        self._step_is_complete = False
        self._saves = False

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let SIGTERM and SIGHUP end a validation outside `fit` at once.

        Lightning's own handler misses a signal that comes during the last batch.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            stop_at_once_on_signals()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the signal handlers; Lightning restores the earlier ones when `fit` ends."""
        self._received = None
        self._step_is_complete = False
        self._global_step = trainer.global_step
        self._saves = any(isinstance(c, LastCheckpoint) for c in callbacks_of(trainer))
        for number in (signal.SIGINT, *_ends()):
            _handle(number, self._note)
        if _WARNING is not None:
            self._on_warning = signal.getsignal(_WARNING)
        if callable(self._on_warning):
            _handle(_WARNING, self._note)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop if a signal has come and this batch completed an optimizer step."""
        self._step_is_complete = trainer.global_step > self._global_step
        self._global_step = trainer.global_step
        self._stop_if_asked(trainer, pl_module)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        """Stop if a signal has come, unless the validation runs in the middle of a step."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._stop_if_asked(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop if a signal came during the last step, and let later signals stop at once."""
        self._step_is_complete = True
        self._stop_if_asked(trainer, pl_module)
        self._let_signals_through()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        self._let_signals_through()
        saving = "and saving" if self._saves else "but saving nothing, which LastCheckpoint would"
        rank_zero_info(
            f"{signal.Signals(number).name}: finishing the step {saving}. "
            "A second signal stops at once."
        )

    def _let_signals_through(self) -> None:
        _handle(signal.SIGINT, signal.default_int_handler)
        stop_at_once_on_signals()
        if callable(self._on_warning):
            _handle(_WARNING, self._on_warning)

    def _stop_if_asked(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._step_is_complete:
            return
        own = torch.tensor(self._received or 0, device=trainer.strategy.root_device)
        # All ranks must stop together, or those without a signal would wait forever.
        received = int(trainer.strategy.reduce(own, reduce_op="max"))
        if not received:
            return
        for callback in callbacks_of(trainer):
            if isinstance(callback, LastCheckpoint):
                callback.on_train_end(trainer, pl_module)
                rank_zero_info(
                    f"Stopped at step {trainer.global_step}; its state: {callback.last_model_path}"
                )
        if received == signal.SIGINT:
            raise KeyboardInterrupt
        if received == _WARNING and self._on_warning:
            self._on_warning(_WARNING, None)
        _stop_at_once(received, None)


def stop_at_once_on_signals() -> None:
    """Let SIGTERM and SIGHUP raise their exceptions wherever this process is."""
    for number in _ends():
        _handle(number, _stop_at_once)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block at once, with its own clean-up; see `StopOnSignal`."""
    before = {number: signal.getsignal(number) for number in _ends()}
    stop_at_once_on_signals()
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # it is not Python's own
                _handle(number, handler)


def _ends() -> list[signal.Signals]:
    """Return the signals that ask a process to end; a SIGHUP that is ignored does not."""
    ignored = _HANGUP is None or signal.getsignal(_HANGUP) == signal.SIG_IGN
    return [signal.SIGTERM] if ignored else [signal.SIGTERM, _HANGUP]


def _stop_at_once(number: int, frame: FrameType | None) -> NoReturn:
    raise SIGHUPException if number == _HANGUP else SIGTERMException


def _handle(number: signal.Signals, handler: Any) -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(number, handler)
