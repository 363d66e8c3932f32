"""Count optimizer steps, however many batches each of them accumulates."""

from __future__ import annotations

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer


class EveryNSteps:
    """Tells a callback's `on_train_batch_end` when `every_n_steps` optimizer steps have passed.

    Args:
        every_n_steps: The number of optimizer steps in an interval; None follows the Trainer's
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
        """Return the steps left in the interval, 1 for its last step; None if it never ends."""
        every = self._every(trainer)
        return every - trainer.global_step % every if every > 0 else None

    def due(self, trainer: Trainer) -> bool:
        """Return whether this batch completes a multiple of `every_n_steps`; True once for each.

        With several optimizers, Lightning's step advances by more than one a batch. A multiple that
        is stepped over still counts.
        """
        step, seen = trainer.global_step, self._seen
        self._seen = step
        every = self._every(trainer)
        return every > 0 and step // every > seen // every

    def _every(self, trainer: Trainer) -> int:
        return self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
