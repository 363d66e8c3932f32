"""The interface of projectors, and the linear algebra that they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor

from lit_ft.compat.ranges import Count


class BasisInput(Enum):
    """The input that a projector needs to move a basis."""

    NOTHING = "nothing"
    SKETCH = "sketch"  # H [r, cols], see `products.projected_gradient_and_sketch`
    GRADIENT = "gradient"  # G [rows, cols] itself, formed for that step


class Projector(ABC):
    """A rule that moves a basis: a frozen dataclass, whose repr records how a run was made.

    Attributes:
        basis_input: The input that `move` needs.
        renews: Whether one move can replace the whole basis. Otherwise a move is a small step,
            after which the basis always seems to have stopped moving.
        starts_from_svd: Whether the first basis comes from an SVD of the first gradient.
        every: The number of optimizer steps between two moves of the same layer's basis, unless
            `Refresh` gives an interval.
        rotates_moments: Whether the optimizer's moments follow the basis. Otherwise they stay in
            the coordinates of the old basis.
    """

    basis_input: ClassVar[BasisInput]
    renews: ClassVar[bool] = True
    starts_from_svd: bool = False
    every: Count
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
        """Return the new basis [r, cols].

        A sketch that is zero or not finite says nothing, and must not affect the new basis.

        Args:
            basis: The basis P [r, cols], in float32 or wider.
            basis_input: The sketch H [r, cols] or the gradient G [rows, cols], whichever the class
                attribute `basis_input` asks for; None if it asks for nothing.
            state: The rule's memory of this basis, changed in place and saved in checkpoints.
            decay: The weights' learning rate as a fraction of its peak.
            generator: The source of random numbers. A resumed run repeats its numbers.
        """


def orthonormal_rows(matrix: Tensor) -> Tensor:
    """Return an orthonormal basis [r, n] of the span of the rows of `matrix` [r, n]."""
    columns: Tensor = torch.linalg.qr(matrix.T).Q
    return columns.T.contiguous()


def principal_rows(matrix: Tensor, *, rounds: int = 3) -> Tensor:
    """Return an orthonormal basis [r, n] of the span of `matrix`'s rows, principal ones first.

    Each round is a step of orthogonal iteration, and takes two QR decompositions of [r, r]. It
    brings the rows closer to the right singular vectors, in the order of the singular values,
    largest first. An SVD would give these vectors exactly. But where singular values are close, as
    in a matrix of lower rank, its vectors would be determined by round-off.

    Args:
        matrix: The matrix [r, n] whose rows span the space.
        rounds: The number of steps of orthogonal iteration.
    """
    columns, triangle = _positive_qr(matrix.T)
    for _ in range(rounds):
        _, transposed = _positive_qr(triangle.T)
        turn, triangle = _positive_qr(transposed.T)
        columns = columns @ turn
    return columns.T.contiguous()


def _positive_qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the unique QR decomposition of `matrix` whose R has no negative diagonal element.

    LAPACK chooses the signs itself. For a small diagonal element, round-off would decide its sign.
    """
    columns, triangle = torch.linalg.qr(matrix)
    diagonal = triangle.diagonal()
    signs = torch.ones_like(diagonal).copysign(diagonal)
    return columns * signs, triangle * signs.unsqueeze(1)


def where_informative(sketch: Tensor, moved: Tensor, basis: Tensor) -> Tensor:
    """Return `moved`, or `basis` if the sketch is zero or not finite. All of them are [r, n].

    The host does not wait for the device.
    """
    scale = sketch.abs().amax()
    return torch.where((scale > 0) & scale.isfinite(), moved, basis)


def captured_energy(basis: Tensor, sketch: Tensor) -> Tensor:
    """Return tr(H Pᵀ) = Σ_s ||R_s||² for P and H [r, n], kept above zero to divide by it."""
    energy = (sketch * basis).sum()
    return energy.clamp_min(torch.finfo(energy.dtype).tiny)
