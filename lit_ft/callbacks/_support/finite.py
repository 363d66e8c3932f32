"""Stop all ranks together if a value on one of them is not finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lit_ft.compat.not_finite import of_weights
from lit_ft.subspace import subspace_layers
from lit_ft.tensors.finite import not_finite

Value = TypeVar("Value")


def on_any_rank(trainer: Trainer, names: Sequence[str]) -> list[str]:
    """Return the names that are given on any rank, in order; all ranks must call this."""
    if trainer.strategy.reduce_boolean_decision(not names, all=True):
        return []
    return list(dict.fromkeys(name for of_rank in gathered(list(names)) for name in of_rank))


def gathered(value: Value) -> list[Value]:
    """Return the value of each rank; all ranks must call this."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def keep_finite(trainer: Trainer, module: LightningModule, purpose: str) -> None:
    """Raise `NotFinite` on all ranks if a weight that training moves is not finite.

    Args:
        trainer: The trainer of the module.
        module: The module with the weights.
        purpose: What the weights are for, such as "saved".
    """
    bad = on_any_rank(trainer, not_finite(_moving_weights(module)))
    if bad:
        raise of_weights(bad, trainer.global_step, purpose)


def _moving_weights(module: LightningModule) -> dict[str, Tensor]:
    # GaLore's layers move weights that need no gradient.
    folded = {layer.weight for layer in subspace_layers(module).values()}
    return {n: p for n, p in module.named_parameters() if p.requires_grad or p in folded}
