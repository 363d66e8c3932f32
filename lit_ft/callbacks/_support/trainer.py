"""Look up what callbacks need in their trainer and its module."""

from __future__ import annotations

import math
from typing import Any, TypeVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

from lit_ft.compat.protocols import Named

AnyCallback = TypeVar("AnyCallback", bound=Callback)


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the trainer's list of callbacks itself, not a copy."""
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]  # set outside __init__


def find_callback(trainer: Trainer, kind: type[AnyCallback]) -> AnyCallback | None:
    """Return the trainer's first callback of class `kind`; None if it has none."""
    return next((c for c in callbacks_of(trainer) if isinstance(c, kind)), None)


def only_optimizer(trainer: Trainer, follower: Callback) -> Optimizer:
    """Return the trainer's optimizer; raise MisconfigurationException if it has several."""
    if len(trainer.optimizers) != 1:
        raise MisconfigurationException(
            f"{type(follower).__name__} follows one optimizer; this module builds "
            f"{len(trainer.optimizers)}: let it build one, of several parameter groups."
        )
    return trainer.optimizers[0]


def network_of(module: LightningModule) -> nn.Module:
    """Return the module's `model` (see `HasModel`), or the module itself if it has none."""
    model = getattr(module, "model", None)
    return model if isinstance(model, nn.Module) else module


def source_name(module: LightningModule) -> str | None:
    """Return the name of the source of the module's model; None if there is no named source."""
    source = getattr(module, "source", None)
    return source.name if isinstance(source, Named) else None


def total_steps(trainer: Trainer) -> float:
    """Return the number of optimizer steps of the whole fit; infinity if nobody knows it.

    Lightning may load the training data to find out, on which all ranks work together. So all ranks
    have to ask, unless the training has begun.
    """
    steps = trainer.estimated_stepping_batches
    return math.inf if steps == -1 else steps  # -1: of epochs whose length is unknown


def loss_scaler(trainer: Trainer) -> Any:
    """Return the gradient scaler of float16, which may skip steps; None if there is no scaler."""
    return getattr(trainer.precision_plugin, "scaler", None)
