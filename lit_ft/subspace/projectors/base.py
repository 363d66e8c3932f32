"""What every projector offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor


class BasisInput(Enum):
    """What a projector looks at when it moves a basis."""

    NOTHING = "nothing"
    SKETCH = "sketch"  # H [r, cols], see `products.projected_gradient_and_sketch`
    GRADIENT = "gradient"  # G [rows, cols] itself: formed for that step


class Projector(ABC):
    """A rule that moves a basis; a frozen dataclass, whose repr says with what a run was made.

    Attributes:
        basis_input: What `move` is given.
        renews: Whether a move finds the basis anew; after a small step it always looks at rest.
        starts_from_svd: Whether the first basis comes from an SVD of the first gradient.
        every: Optimizer steps between two moves of the same layer's basis, where `Refresh`, which
            says when bases move, gives no interval of its own.
        rotates_moments: Whether the optimizer's moments follow the basis.
    """

    basis_input: ClassVar[BasisInput]
    renews: ClassVar[bool] = True
    starts_from_svd: bool = False
    every: int
    rotates_moments: bool

    @property
    def forms_gradients(self) -> bool:
        """Whether a basis is ever taken from a whole gradient."""
        return self.basis_input is BasisInput.GRADIENT or self.starts_from_svd

    @abstractmethod
    def move(
        self,
        basis: Tensor,
        basis_input: Tensor | None,
        *,
        state: dict[str, Tensor],
        decay: float,
        generator: torch.Generator,
    ) -> Tensor:
        """Return the new basis [r, cols]; the old one where the basis_input says nothing.

        Args:
            basis: [r, cols], in float32 or wider.
            basis_input: As `basis_input` says; None for NOTHING.
            state: What the rule remembers of this basis; saved with the run.
            decay: The weights' learning rate now over its peak.
            generator: Random numbers that a resumed run repeats.
        """


def orthonormal_rows(matrix: Tensor) -> Tensor:
    """Return an orthonormal basis [r, n] of the rows of `matrix` [r, n]."""
    columns: Tensor = torch.linalg.qr(matrix.T).Q
    return columns.T.contiguous()


def principal_rows(matrix: Tensor, *, rounds: int = 3) -> Tensor:
    """Return an orthonormal basis [r, n] of the rows of `matrix` [r, n], principal ones first.

    Each round takes the rows towards the right singular vectors, the largest value's first: two QR
    decompositions of [r, r], a step of orthogonal iteration. An SVD would go all the way, but where
    values are close (those of a matrix of lower rank) its vectors are round-off.
    """
    columns, triangle = _positive_qr(matrix.T)
    for _ in range(rounds):
        _, transposed = _positive_qr(triangle.T)
        turn, triangle = _positive_qr(transposed.T)
        columns = columns @ turn
    return columns.T.contiguous()


def _positive_qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """QR with the signs that make it unique: LAPACK's turn with the last bits of a small pivot."""
    columns, triangle = torch.linalg.qr(matrix)
    signs = torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(matrix.dtype)
    return columns * signs, triangle * signs.unsqueeze(1)


def where_informative(sketch: Tensor, moved: Tensor, basis: Tensor) -> Tensor:
    """Return `moved`, but `basis` where the sketch is zero or not finite (no host sync)."""
    scale = sketch.abs().amax()
    return torch.where((scale > 0) & scale.isfinite(), moved, basis)


def captured_energy(basis: Tensor, sketch: Tensor) -> Tensor:
    """Return tr(H Pᵀ) = Σ_s ||R_s||², a scalar; tiny in place of zero, for dividing by it."""
    energy = (sketch * basis).sum()
    return energy.clamp_min(torch.finfo(energy.dtype).tiny)
