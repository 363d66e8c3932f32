"""The learning rate of every parameter group, in the logs."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor as LightningLearningRateMonitor


class LearningRateMonitor(LightningLearningRateMonitor):
    """Lightning's monitor, which also accepts groups without a learning rate and no logger at all.

    Adafactor with `relative_step=True` chooses its step size itself and has `lr=None`: Lightning's
    monitor stops the run there, this one leaves the group out. Arguments: as Lightning's.
    """

    def on_train_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Find the groups' names, if there is a logger to send them to."""
        if trainer.loggers:
            super().on_train_start(trainer, *args, **kwargs)

    def on_train_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Log each group's learning rate, if there is a logger."""
        if trainer.loggers:
            super().on_train_batch_start(trainer, *args, **kwargs)

    def on_train_epoch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Log those that change by epoch, if there is a logger."""
        if trainer.loggers:
            super().on_train_epoch_start(trainer, *args, **kwargs)

    def _extract_lr(self, param_group: dict[str, Any], name: str) -> dict[str, Any]:
        return {} if param_group.get("lr") is None else super()._extract_lr(param_group, name)
