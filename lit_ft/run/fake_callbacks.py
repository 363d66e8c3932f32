"""The callbacks of a run that its memory plan needs, and what stands for the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
    WeightAveraging,
)
from peft import PeftModel

from lit_ft.callbacks import (
    BlockUpdate,
    ExportHF,
    GaLore,
    LayerwiseUpdate,
    StopOnNonFinite,
    SubspaceRefresh,
)
from lit_ft.callbacks._support.trainer import find_callback
from lit_ft.measure.follower import Follower
from lit_ft.measure.live_memory import Place
from lit_ft.models.export.whole import copied_to_host, merged
from lit_ft.tensors.sharding import is_model_sharded

# The callbacks that hold memory during a step. All others only watch, save or stop.
_IN_A_STEP = (
    BlockUpdate,
    GaLore,
    GradientAccumulationScheduler,
    LayerwiseUpdate,
    StochasticWeightAveraging,
    StopOnNonFinite,
    SubspaceRefresh,
    WeightAveraging,
)


def callbacks_in_a_plan(settings: Any, *, on_host: bool) -> Iterator[Callback]:
    """Yield the callbacks that hold memory of the device, or what holds as much.

    Args:
        settings: The settings of the run's callbacks.
        on_host: Whether the device is the CPU.
    """
    for callback in _made(settings):
        if isinstance(callback, BlockUpdate):
            callback.plan_for_largest()
        if isinstance(callback, _IN_A_STEP):
            yield callback
        elif on_host and isinstance(callback, ExportHF):
            yield _Export(callback)


def block_update(settings: Any) -> BlockUpdate | None:
    """Return the block updates of a run, if it has any."""
    return next((one for one in _made(settings) if isinstance(one, BlockUpdate)), None)


def _made(settings: Any) -> Iterator[Any]:
    return (instantiate(one, _convert_="all") for one in settings or [])


class _Export(Callback):
    """Makes the copy of a model that its export merges or casts, where the host is the device.

    Args:
        export: The export of the run.
    """

    def __init__(self, export: ExportHF) -> None:
        self.export = export

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        follower = find_callback(trainer, Follower)
        if follower is not None:  # none if real tensors are trained, to check plans
            follower.tracker.place = Place("export", trainer.global_step)
        model: Any = pl_module.model
        if is_model_sharded(model):
            return  # it is written piece by piece
        if isinstance(model, PeftModel):
            # How 4-bit weights are dequantised, fake tensors do not show.
            if self.export.merge and not getattr(model.get_base_model(), "is_quantized", False):
                merged(model)
        elif self.export.dtype is not None:
            copied_to_host(model)


class Buckets(Callback):
    """Holds the memory of DDP's buckets, in which the ranks exchange their gradients."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the buckets."""
        self.buckets = [torch.empty_like(p) for p in pl_module.parameters() if p.requires_grad]
