"""Block power iteration: the basis of GaLore without an SVD."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_ft.compat.ranges import Count
from lit_ft.subspace.projectors.base import BasisInput, Projector, principal_rows, where_informative


@dataclass(frozen=True)
class SubspaceIteration(Projector):
    """P ← orth(H + ε P): a round of block power iteration on Σ_s G_sᵀ G_s, from the current basis.

    The shift ε does not change the limit of the iteration. If the samples span fewer directions
    than P, the shift keeps P's old directions for the rest. Without it, the rest would be
    round-off, which depends on how the batch is cut.

    A round costs thin products and a QR decomposition of [cols, r]. Repeated over a run, the rounds
    follow the top right singular vectors that GaLore (arXiv:2403.03507) computes by an SVD of G.
    """

    basis_input: ClassVar[BasisInput] = BasisInput.SKETCH
    every: Count = 200
    rotates_moments: bool = True

    def move(self, basis: Tensor, basis_input: Tensor | None, **_: Any) -> Tensor:
        """Return the principal directions [r, cols] of the sketch."""
        assert basis_input is not None
        limits = torch.finfo(basis_input.dtype)
        scaled = basis_input / basis_input.abs().amax().clamp_min(limits.tiny)
        shifted = torch.add(scaled, basis, alpha=math.sqrt(limits.eps))
        return where_informative(basis_input, principal_rows(shifted), basis)
