"""Show the memory in use in the logs and in the progress bar."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_ft.callbacks._support.every_n_steps import EveryNSteps
from lit_ft.compat.ranges import Count
from lit_ft.measure.memory import current_bytes, peak_bytes, reset_peak

_GIB = 2**30


class MemoryMonitor(Callback):
    """Log `memory/allocated` and `memory/peak` in GiB, each the maximum over all ranks.

    The progress bar shows the peak as `peak GiB`. On devices whose peak can be reset, it counts
    from the start of training, so it does not include the loading of the model. What is measured
    depends on the device: see `lit_ft.measure.MemoryReading`.

    Args:
        every_n_steps: The number of optimizer steps between readings; None uses the Trainer's
            `log_every_n_steps`.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> trainer = L.Trainer(
        ...     callbacks=[MemoryMonitor(every_n_steps=1)],
        ...     max_steps=2,
        ...     logger=False,
        ...     accelerator="cpu",
        ...     enable_checkpointing=False,
        ...     enable_progress_bar=False,
        ...     enable_model_summary=False,
        ... )
        >>> trainer.fit(BoringModel())
        >>> bool(trainer.callback_metrics["peak GiB"] > 0)
        True
    """

    def __init__(self, every_n_steps: Count | None = None) -> None:
        self._every_n = EveryNSteps(every_n_steps)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting steps, and reset the peak."""
        self._every_n.start(trainer)
        reset_peak(trainer.strategy.root_device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log if `every_n_steps` steps have passed since the last reading."""
        if not self._every_n.due(trainer):
            return
        device = trainer.strategy.root_device
        readings = [current_bytes(device).value, peak_bytes(device).value]
        gib = torch.tensor(readings, device=device).float() / _GIB
        largest: Any = trainer.strategy.reduce(gib, reduce_op="max")
        allocated, peak = largest.tolist()
        # Lightning numbers logged steps from 0.
        for logger in trainer.loggers:
            metrics = {"memory/allocated": allocated, "memory/peak": peak}
            logger.log_metrics(metrics, step=trainer.global_step - 1)
        pl_module.log("peak GiB", peak, prog_bar=True, logger=False)
