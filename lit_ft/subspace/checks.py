"""What cannot be trained in subspaces: refused by name, with the remedy."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_ft.compat.match import reason_against
from lit_ft.subspace.layers.base import SubspaceLayer
from lit_ft.tensors.sharding import full_tensor, holds_whole_rows, is_sharded

# What the optimizer's own step must not depend on: S is zero before it.
_NEEDS_THE_WEIGHT = {
    r"^(transformers|lit_ft)\..*Adafactor$": None,  # with the options that are looked at below
    r"\.Adafactor": "torch.optim.Adafactor scales its step by the parameter's size: use "
    "transformers' Adafactor with scale_parameter=False, or AdamW",
    r"\.LBFGS": "LBFGS keeps copies of the parameters: use AdamW",
    r"\.(?i:lars)": "LARS scales its step by the parameter's norm: use AdamW",
    r"(?i:lamb)(\d+bit)?$": "LAMB scales its step by the parameter's norm: use AdamW",
    r"\.(Prodigy|DAdapt)": "it measures the distance from the first parameters: use AdamW",
    r"\.(A?SAM|Lookahead)$": "it steps from and to copies of the parameters: use AdamW",
    r"ScheduleFree": "schedule-free optimizers keep copies of the parameters: use AdamW",
}

# Their weight decay is added to the gradient, unless a group says otherwise.
_ADDS_DECAY_TO_GRADIENT = (
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.Adamax,
    torch.optim.ASGD,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.SGD,
)
_OF_BITSANDBYTES = ("Adagrad", "RMSprop", "SGD")  # and these with "8bit" or "32bit" behind


def refuse_unfit(optimizer: Optimizer) -> None:
    """Raise ValueError for an optimizer whose step has no meaning on parameters that are zero."""
    if reason := reason_against(type(optimizer), _NEEDS_THE_WEIGHT):
        raise ValueError(f"GaLore cannot train with this optimizer: {reason}.")
    if getattr(optimizer, "is_paged", False):
        raise ValueError(
            f"{type(optimizer).__name__} keeps its state in memory that a move of a basis cannot "
            "turn: use AdamW8bit, whose state of a subspace is small as it is."
        )
    for group in optimizer.param_groups:
        if group.get("scale_parameter") or group["lr"] is None:
            raise ValueError(
                "Adafactor scales its step by the parameter's size, and a subspace parameter is "
                "zero: set scale_parameter=False and relative_step=False, with a learning rate."
            )
        coupled = isinstance(optimizer, _ADDS_DECAY_TO_GRADIENT)
        coupled |= type(optimizer).__name__.startswith(_OF_BITSANDBYTES)
        coupled |= not getattr(optimizer, "is_adamw", True)  # torchao's Adam and AdamW are one
        decoupled = group.get("decoupled_weight_decay", not coupled)
        if group.get("weight_decay") and not decoupled:
            raise ValueError(
                f"{type(optimizer).__name__} adds weight decay to the gradient, and a subspace "
                "parameter is zero: set weight_decay=0, or use AdamW."
            )


def refuse_float16(name: str, weight: Tensor) -> None:
    """Raise ValueError for a layer whose weight is float16."""
    if weight.dtype is torch.float16:
        raise ValueError(
            f"{name} has float16 weights, which lose small updates: use bfloat16, or "
            "precision=16-mixed, which keeps them in float32."
        )


def refuse_resized(name: str, layer: SubspaceLayer) -> None:
    """Raise ValueError for a layer whose weight has got another number of rows or columns."""
    rows, cols = layer.moving_weight.shape
    if (len(layer.delta), layer.basis.shape[1]) != (rows, cols):
        raise ValueError(
            f"{name} is [{rows}, {cols}] now and went into its subspace with {len(layer.delta)} "
            f"rows and {layer.basis.shape[1]} columns: resize embeddings before GaLore."
        )


def refuse_sharding(layers: Mapping[str, SubspaceLayer], *, forms_gradients: bool) -> None:
    """Raise ValueError where weights are shared among ranks so that none has what it needs.

    Args:
        layers: By name.
        forms_gradients: Bases are taken from whole gradients.
    """
    for name, layer in layers.items():
        if not holds_whole_rows(layer.weight):
            raise ValueError(
                f"{name} is sharded by columns, and a subspace needs whole rows: leave fully_shard "
                "its Shard(0)."
            )
        if is_sharded(layer.weight) and forms_gradients:
            raise ValueError(
                f"SVD takes bases from whole gradients, and no rank has that of {name}, which is "
                "sharded: use SubspaceIteration or Oja."
            )


def refuse_non_finite(gradients: Mapping[str, Tensor | None], step: int) -> None:
    """Raise FloatingPointError, on every rank, if a gradient is not finite.

    Args:
        gradients: By layer.
        step: The optimizer step that they are for.
    """
    present = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    # A sum over the ranks: the maximum of NaN and a number may be the number.
    norm = torch.nn.utils.get_total_norm(present.values())
    if full_tensor(norm).isfinite():  # the one time that the host waits for the device
        return
    bad = [name for name, gradient in present.items() if not full_tensor(gradient).isfinite().all()]
    if bad:  # else the norm alone left its range
        raise FloatingPointError(
            f"The gradient of {', '.join(bad[:4])}{', ...' * (len(bad) > 4)} is not finite at step "
            f"{step}: lower the learning rate, look at this step's data, or train in a wider "
            "precision. These layers' weights are those of the step before."
        )
