"""Oja's rule: track the top subspace by small steps, without state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lit_ft.subspace.projectors.base import Evidence, captured_energy, where_informative


def oja_step(basis: Tensor, sketch: Tensor, *, step_size: float) -> Tensor:
    """Return P + η H (I − PᵀP), orthonormalised by one Newton–Schulz pass.

    H is normalised by the energy that P captures. A small step leaves P nearly orthonormal, and
    P ← 1.5 P − 0.5 (P Pᵀ) P squares the error that is left. Oja (1982); arXiv:2408.12857.

    Args:
        basis: P [r, n] with orthonormal rows.
        sketch: H [r, n].
        step_size: η.
    """
    drift = sketch / captured_energy(basis, sketch)
    drift = drift - (drift @ basis.T) @ basis
    # The pass converges for ||P|| < √3: a drift of norm 1 or more is cut to 1.
    drift = drift * (step_size / (step_size * drift.norm()).clamp_min(1))
    moved = basis + drift
    return torch.add(1.5 * moved, (moved @ moved.T) @ moved, alpha=-0.5)


@dataclass(frozen=True)
class Oja:
    """Online subspace descent on orthonormal bases, the stateless form.

    Attributes:
        step_size: η is `step_size` √r.
        every: Optimizer steps between two moves of a layer's basis.
        rotates_moments: Whether the optimizer's moments follow the basis.
    """

    evidence: ClassVar[Evidence] = Evidence.SKETCH
    step_size: float = 0.1
    every: int = 1
    rotates_moments: bool = True

    def move(
        self,
        basis: Tensor,
        evidence: Tensor | None,
        *,
        state: dict[str, Tensor],
        decay: float,
        generator: torch.Generator,
    ) -> Tensor:
        """Return the basis after one step of Oja's rule."""
        assert evidence is not None
        moved = oja_step(basis, evidence, step_size=self.step_size * math.sqrt(len(basis)))
        return where_informative(evidence, moved, basis)
