"""The interface of projectors, and the linear algebra that they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor


class BasisInput(Enum):
    """The input that a projector needs to move a basis."""

    NOTHING = "nothing"
    SKETCH = "sketch"  # H [r, cols], see `products.projected_gradient_and_sketch`
    GRADIENT = "gradient"  # G [rows, cols] itself, formed for that step


class Projector(ABC):
    """A rule that moves a basis: a frozen dataclass, whose repr records how a run was made.

    Attributes:
        basis_input: The input that `move` needs.
        renews: Whether a move finds the basis again from scratch. After a small step a basis always
            seems to be at rest.
        starts_from_svd: Whether the first basis comes from an SVD of the first gradient.
        every: The optimizer steps between two moves of the same layer's basis,
            unless `Refresh` gives an interval.
        rotates_moments: Whether the optimizer's moments follow the basis.
    """

    basis_input: ClassVar[BasisInput]
    renews: ClassVar[bool] = True
    starts_from_svd: bool = False
    every: int
    rotates_moments: bool

    @property
    def forms_gradients(self) -> bool:
        """Whether a basis is ever computed from a whole gradient."""
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
        """Return the new basis [r, cols], or the old one if the input is zero or not finite.

        Args:
            basis: The basis P [r, cols], in float32 or wider.
            basis_input: The sketch H [r, cols] or the gradient G [rows, cols], as the class
                attribute of this name says; None for NOTHING.
            state: The rule's memory of this basis, changed in place and saved with the run.
            decay: The weights' learning rate as a fraction of its peak.
            generator: The source of random numbers, which a resumed run repeats.
        """


def orthonormal_rows(matrix: Tensor) -> Tensor:
    """Return an orthonormal basis [r, n] of the rows of `matrix` [r, n]."""
    columns: Tensor = torch.linalg.qr(matrix.T).Q
    return columns.T.contiguous()


def principal_rows(matrix: Tensor, *, rounds: int = 3) -> Tensor:
    """Return an orthonormal basis [r, n] of the rows of `matrix` [r, n], principal ones first.

    Each round is a step of orthogonal iteration, two QR decompositions of [r, r]. It takes the rows
    towards the right singular vectors, the one of the largest value first. An SVD would go all the
    way, but its vectors are round-off where values are close, as in a matrix of lower rank.
    """
    columns, triangle = _positive_qr(matrix.T)
    for _ in range(rounds):
        _, transposed = _positive_qr(triangle.T)
        turn, triangle = _positive_qr(transposed.T)
        columns = columns @ turn
    return columns.T.contiguous()


def _positive_qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the unique QR with positive pivots: LAPACK's sign of a small one is round-off."""
    columns, triangle = torch.linalg.qr(matrix)
    signs = torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(matrix.dtype)
    return columns * signs, triangle * signs.unsqueeze(1)


def where_informative(sketch: Tensor, moved: Tensor, basis: Tensor) -> Tensor:
    """Return `moved`, or `basis` if the sketch is zero or not finite; all [r, n], no host sync."""
    scale = sketch.abs().amax()
    return torch.where((scale > 0) & scale.isfinite(), moved, basis)


def captured_energy(basis: Tensor, sketch: Tensor) -> Tensor:
    """Return tr(H Pᵀ) = Σ_s ||R_s||², a positive scalar to divide by, for P and H [r, n]."""
    energy = (sketch * basis).sum()
    return energy.clamp_min(torch.finfo(energy.dtype).tiny)
