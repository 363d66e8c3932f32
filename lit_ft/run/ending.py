"""Why a run ended, in one short sentence."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

from lit_ft.callbacks._support.trainer import callbacks_of


class BestSteps:
    """Remembers the step at which each `EarlyStopping` saw its best score, which it does not.

    Attributes:
        of: The best score and its step (None if unknown) as a list, keyed by the metric's name.
    """

    def __init__(self) -> None:
        self.of: dict[str, list[Any]] = {}

    def start(self, trainer: Trainer) -> None:
        """Note scores that were restored from a checkpoint, whose steps may not be known."""
        for name, score in _best_scores(trainer):
            if name not in self.of or self.of[name][0] != score:
                self.of[name] = [score, None]

    def note(self, trainer: Trainer) -> None:
        """Note the step of each score that has become better since the last call."""
        for name, score in _best_scores(trainer):
            if name not in self.of or self.of[name][0] != score:
                self.of[name] = [score, trainer.global_step]


def why_fit_ended(trainer: Trainer, best: BestSteps) -> str:
    """Return why `fit` came to its end; call it before the trainer does anything else."""
    reason = _reason(trainer, best)
    return reason if trainer.global_step else f"no step was taken: {reason}"


def _reason(trainer: Trainer, best: BestSteps) -> str:
    step = trainer.global_step
    if trainer.limit_train_batches == 0:
        return "limit_train_batches=0 reached"
    if 0 <= trainer.max_steps <= step:
        return f"max_steps={trainer.max_steps} reached"
    if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch:
        return f"max_epochs={trainer.max_epochs} reached at step {step}"
    for callback in callbacks_of(trainer):
        if isinstance(callback, Timer) and _is_up(callback):
            elapsed = timedelta(seconds=round(callback.time_elapsed()))
            return f"max_time reached after {elapsed}, at step {step}"
    for callback in callbacks_of(trainer):
        if isinstance(callback, EarlyStopping) and trainer.should_stop:
            reason = callback.stopping_reason
            if reason == EarlyStoppingReason.PATIENCE_EXHAUSTED:
                return f"early stopping: {_exhausted(callback, best)}"
            if reason != EarlyStoppingReason.NOT_STOPPED:
                said = callback.stopping_reason_message or reason.name
                return f"early stopping: {said.removesuffix(' Signaling Trainer to stop.')}"
    return f"a callback stopped the training at step {step}"


def _is_up(timer: Timer) -> bool:
    remaining = timer.time_remaining()
    return remaining is not None and remaining <= 0


def _exhausted(callback: EarlyStopping, best: BestSteps) -> str:
    score, at = best.of.get(callback.monitor, [float(callback.best_score), None])
    place = "" if at is None else f" at step {at}"
    return (
        f"{callback.monitor} did not improve for {callback.wait_count} validations, "
        f"best {score:.4g}{place}"
    )


def _best_scores(trainer: Trainer) -> Iterator[tuple[str, float]]:
    for callback in callbacks_of(trainer):
        if isinstance(callback, EarlyStopping):
            score = float(callback.best_score)
            if math.isfinite(score):  # it starts at infinity
                yield callback.monitor, score
