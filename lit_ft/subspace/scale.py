"""The scale α: how far a step in the subspace moves the weight."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer

from lit_ft.compat.optimizers import traits_of
from lit_ft.subspace.layers.base import SubspaceLayer


def matching_scale(layer: SubspaceLayer, optimizer: Optimizer, group: dict[str, Any]) -> float:
    """Return the α with which a learning rate has the same effect as on the whole weight W.

    - For AdamW, and other optimizers whose updates have RMS 1, α is √(cols / r). An update of RMS 1
      in S then has RMS 1 in α S P too. For layers whose rows are tokens, α is 1.
    - For SGD, α is 1. Its step on S, times P, is its step on W, projected onto the subspace.
    - For Muon, the spectral norm of an update depends on the shape, and α is the norm for W's shape
      divided by the norm for S's. If Muon itself matches AdamW ("match_rms_adamw"), α is AdamW's.

    Args:
        layer: The layer whose weight is W and whose trained parameter `delta` is S.
        optimizer: The optimizer that steps S.
        group: The optimizer's parameter group that holds S.
    """
    step_size = traits_of(type(optimizer)).step_size
    if step_size == "gradient":
        return 1.0
    if step_size == "spectral" and group["adjust_lr_fn"] in (None, "original"):
        of_weight, of_delta = (
            math.sqrt(max(1, rows / cols)) for rows, cols in (layer.weight.shape, layer.delta.shape)
        )
        return of_weight / of_delta
    # A batch says little about most tokens. Their gradients are noise in most coordinates, and
    # AdamW scales this noise to full size (benchmarks/results/quality_variants.jsonl).
    return 1.0 if layer.rows_are_tokens else math.sqrt(layer.basis.shape[1] / layer.rank)
