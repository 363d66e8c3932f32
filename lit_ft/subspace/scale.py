"""α: how large a step in the subspace is in the weight."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer

from lit_ft.compat.optimizers import traits_of
from lit_ft.subspace.layers.base import SubspaceLayer


def matching_scale(layer: SubspaceLayer, optimizer: Optimizer, group: dict[str, Any]) -> float:
    """Return the α with which a learning rate means what it means to the optimizer on W.

    - AdamW, and whatever else makes updates of one size (RMS 1): √(cols / r), as an update of RMS 1
      in S then has RMS 1 in α S P too. 1 for the rows of tokens.
    - SGD: 1. Its step in S, times P, is its step on W, projected.
    - Muon, whose updates have a spectral norm that hangs on the shape: the ratio of the two norms;
      AdamW's α where Muon itself is made to match AdamW ("match_rms_adamw").

    Args:
        layer: That S belongs to.
        optimizer: That steps S.
        group: The optimizer's, that S is in.
    """
    step_size = traits_of(type(optimizer)).step_size
    if step_size == "gradient":
        return 1.0
    if step_size == "spectral" and group["adjust_lr_fn"] in (None, "original"):
        of_weight, of_delta = (
            math.sqrt(max(1, rows / cols)) for rows, cols in (layer.weight.shape, layer.delta.shape)
        )
        return of_weight / of_delta
    # Of most tokens a batch says little: their gradients are noise in most coordinates, and AdamW
    # takes each to full size (benchmarks/results/quality_variants.jsonl).
    return 1.0 if layer.rows_are_tokens else math.sqrt(layer.basis.shape[1] / layer.rank)
