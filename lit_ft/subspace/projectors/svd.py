"""GaLore's own rule: the top singular vectors of the current gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_ft.compat.ranges import Count
from lit_ft.subspace.projectors.base import BasisInput, Projector


@dataclass(frozen=True)
class SVD(Projector):
    """P ← the top-r right singular vectors of G, every `every` steps (arXiv:2403.03507, alg. 2).

    This is the reference rule. At a step at which bases move, it forms G for their layers, and the
    SVD takes most of the step's time. By default, the moments stay in the coordinates of the old
    basis, as in the paper.

    Attributes:
        every: The number of optimizer steps between two moves (200 in the paper), unless `Refresh`
            gives an interval.
    """

    basis_input: ClassVar[BasisInput] = BasisInput.GRADIENT
    every: Count = 200
    rotates_moments: bool = False

    def move(self, basis: Tensor, basis_input: Tensor | None, **_: Any) -> Tensor:
        """Return the top right singular vectors [r, cols] of `basis_input` [rows, cols]."""
        assert basis_input is not None
        right: Tensor = torch.linalg.svd(basis_input.to(basis.dtype), full_matrices=False)[2]
        return right[: len(basis)].contiguous()
