"""Count intervals of optimizer steps, however many batches a step accumulates."""

from __future__ import annotations

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer


class EveryNSteps:
    """Tells a callback's `on_train_batch_end` when `every_n_steps` optimizer steps have passed.

    Args:
        every_n_steps: The number of optimizer steps in an interval; None uses the Trainer's
            `log_every_n_steps`.

    Raises:
        MisconfigurationException: If `every_n_steps` is below 1.
    """

    def __init__(self, every_n_steps: int | None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise MisconfigurationException(
                f"every_n_steps={every_n_steps} must be at least 1, or None for the default."
            )
        self.every_n_steps = every_n_steps
        self._seen = 0

    def start(self, trainer: Trainer) -> None:
        """Start counting at the trainer's current step; call this in `on_train_start`."""
        self._seen = trainer.global_step

    def remaining(self, trainer: Trainer) -> int | None:
        """Return how many steps are left in the interval, or None if it never ends.

        The current step counts too, so the result is 1 for the last step of the interval.
        """
        every = self._every(trainer)
        return every - trainer.global_step % every if every > 0 else None

    def due(self, trainer: Trainer) -> bool:
        """Return whether this batch completed an interval; call it once after each batch.

        With several optimizers, Lightning's `global_step` grows by more than one per batch. An
        interval that ends in between still counts.
        """
        step, seen = trainer.global_step, self._seen
        self._seen = step
        every = self._every(trainer)
        return every > 0 and step // every > seen // every

    def _every(self, trainer: Trainer) -> int:
        return self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
