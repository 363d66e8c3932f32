"""Log the learning rate of every parameter group."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor as LightningLearningRateMonitor


class LearningRateMonitor(LightningLearningRateMonitor):
    """Lightning's monitor, extended to groups without a learning rate and runs without a logger.

    Adafactor with `relative_step=True` chooses its own step size, so its groups have `lr=None`.
    Lightning's monitor stops the run at such a group; this one leaves the group out. With gradient
    accumulation, Lightning's monitor logs in each micro-batch; this one in the first. The arguments
    are those of Lightning's `LearningRateMonitor`.

    Example:
        >>> import lightning as L
        >>> monitor = LearningRateMonitor(logging_interval="step")
        >>> trainer = L.Trainer(callbacks=[monitor], logger=False, accelerator="cpu")
    """

    def on_train_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Find the names of the groups, if there is a logger."""
        if trainer.loggers:
            super().on_train_start(trainer, *args, **kwargs)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Log each group's learning rate once in an optimizer step, if there is a logger."""
        if trainer.loggers and batch_idx % trainer.accumulate_grad_batches == 0:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_epoch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Log the learning rates that change by epoch, if there is a logger."""
        if trainer.loggers:
            super().on_train_epoch_start(trainer, *args, **kwargs)

    def _extract_lr(self, param_group: dict[str, Any], name: str) -> dict[str, Any]:
        return {} if param_group.get("lr") is None else super()._extract_lr(param_group, name)
