"""Refuse what cannot be trained in subspaces, with errors that name it and the remedy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_ft.compat import remedies
from lit_ft.compat.not_finite import of_gradients
from lit_ft.compat.optimizers import traits_of, unwrapped
from lit_ft.compat.plan import Basis, Plan
from lit_ft.compat.refusal import Refusal
from lit_ft.compat.rules import check
from lit_ft.subspace.layers.base import SubspaceLayer
from lit_ft.tensors.sharding import full_tensor, holds_whole_rows, is_sharded

MATCH_ADAMW: Final = "match_adamw"


def check_settings(*, every: object = 1, scale: object = MATCH_ADAMW) -> None:
    """Raise ValueError for an invalid interval or scale.

    Args:
        every: The number of optimizer steps between two moves of a basis, an integer of at least 1.
        scale: The scale α of steps in a subspace, a positive number or "match_adamw".
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every={every}: give a whole number of optimizer steps, at least 1.")
    number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if scale != MATCH_ADAMW and not (number and 0 < float(str(scale)) < math.inf):
        raise ValueError(f"scale={scale}: give a positive number, or '{MATCH_ADAMW}'.")


def check_steps_from_zero(optimizer: Optimizer) -> None:
    """Raise Refusal for an optimizer that cannot step parameters that are zero before each step."""
    name, traits = unwrapped(type(optimizer)).__name__, traits_of(type(optimizer))
    if getattr(optimizer, "is_paged", False):
        traits = replace(
            traits,
            movable_state=False,
            why="paged optimizers keep their state where nothing else can reach it",
        )
    check(Plan(name, traits, basis=Basis("")), parts=["galore"])
    for group in optimizer.param_groups:
        if group.get("scale_parameter") or group["lr"] is None:
            raise Refusal(
                f"{name} scales its step by the parameter's size, and a subspace parameter is zero",
                remedies.optimizer("adafactor_fixed"),
            )
        # A group may override the default of its class.
        decoupled = group.get("decoupled_weight_decay", traits.decoupled_decay)
        if group.get("weight_decay") and not decoupled:
            raise Refusal(
                f"{name} adds weight decay to the gradient, and a subspace parameter is zero",
                remedies.NO_DECAY,
                remedies.optimizer("adamw"),
            )


def check_layer(name: str, layer: SubspaceLayer, *, forms_gradients: bool) -> None:
    """Raise ValueError for a layer that has changed so that its subspace no longer fits.

    Args:
        name: The name of the layer.
        layer: The layer. Its weight may have been cast, resized or sharded since it entered its
            subspace.
        forms_gradients: Whether the projector computes bases from whole gradients.
    """
    check_dtype(name, layer.weight)
    rows, cols = layer.moving_weight.shape
    if (len(layer.delta), layer.basis.shape[1]) != (rows, cols):
        raise ValueError(
            f"{name} is [{rows}, {cols}] now, and entered its subspace with {len(layer.delta)} "
            f"rows and {layer.basis.shape[1]} columns: resize embeddings before GaLore."
        )
    if not holds_whole_rows(layer.weight):
        raise ValueError(
            f"{name} is sharded by columns, and a subspace needs whole rows: let fully_shard use "
            "Shard(0), its default."
        )
    if is_sharded(layer.weight) and forms_gradients:
        raise ValueError(
            f"SVD computes bases from whole gradients, and no rank has that of {name}, which is "
            "sharded: use SubspaceIteration or Oja."
        )


def check_dtype(name: str, weight: Tensor) -> None:
    """Raise Refusal for a layer whose weight is float16."""
    if weight.dtype is torch.float16:
        raise Refusal(
            f"{name} has float16 weights, which lose small updates",
            remedies.BF16_TRUE,
            remedies.FP16_MIXED,
        )


def check_finite(gradients: Mapping[str, Tensor | None], step: int) -> None:
    """Raise NotFinite, on every rank, if a gradient is not finite.

    Args:
        gradients: The gradient of each layer, keyed by name; None for a layer that has none.
        step: The number of optimizer steps before the one that the gradients are for.
    """
    present = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    # The norm is a sum over the ranks. A maximum could lose NaN: that of NaN and 1 may be 1.
    norm = torch.nn.utils.get_total_norm(present.values())
    if full_tensor(norm).isfinite():  # the only time that the host waits for the device
        return
    bad = [name for name, gradient in present.items() if not full_tensor(gradient).isfinite().all()]
    if bad:  # else only the norm overflowed
        raise of_gradients(bad, step)
