"""Random bases: the baseline that bases from data must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_ft.compat.ranges import Count
from lit_ft.subspace.projectors.base import BasisInput, Projector, orthonormal_rows


@dataclass(frozen=True)
class Random(Projector):
    """P ← orth(Gaussian): a new random basis at each move, as in Flora (arXiv:2402.03293).

    Attributes:
        every: The number of optimizer steps between two draws, unless `Refresh` gives an interval.
    """

    basis_input: ClassVar[BasisInput] = BasisInput.NOTHING
    every: Count = 200
    rotates_moments: bool = True

    def move(
        self, basis: Tensor, basis_input: Tensor | None, *, generator: torch.Generator, **_: Any
    ) -> Tensor:
        """Return a new random orthonormal basis [r, cols]."""
        drawn = torch.randn(
            basis.shape, dtype=basis.dtype, device=basis.device, generator=generator
        )
        return orthonormal_rows(drawn)
