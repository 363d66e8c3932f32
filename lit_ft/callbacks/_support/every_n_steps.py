"""Every n optimizer steps, said once a step however many batches are accumulated."""

from __future__ import annotations

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer


class EveryNSteps:
    """Tells a callback's `on_train_batch_end` when `every_n_steps` optimizer steps have passed.

    Args:
        every_n_steps: optimizer steps; None follows the Trainer's `log_every_n_steps`.

    Raises:
        MisconfigurationException: `every_n_steps` is below 1.
    """

    def __init__(self, every_n_steps: int | None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise MisconfigurationException(
                f"every_n_steps={every_n_steps} must be at least 1, or None for the default."
            )
        self.every_n_steps = every_n_steps
        self._seen = 0

    def start(self, trainer: Trainer) -> None:
        """Count from the step that the trainer is at; call it in `on_train_start`."""
        self._seen = trainer.global_step

    def remaining(self, trainer: Trainer) -> int | None:
        """Optimizer steps until it is due, 1 for the one under way; None if it never is."""
        every = self._every(trainer)
        return every - trainer.global_step % every if every > 0 else None

    def due(self, trainer: Trainer) -> bool:
        """True once for each multiple of `every_n_steps`, on the batch that completes the step.

        With several optimizers Lightning's step advances by more than one a batch, so a multiple
        may be stepped over and still counts.
        """
        step, seen = trainer.global_step, self._seen
        self._seen = step
        every = self._every(trainer)
        return every > 0 and step // every > seen // every

    def _every(self, trainer: Trainer) -> int:
        return self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
