"""Online subspace descent: gradient steps on the online-PCA objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from lit_ft.compat.ranges import Count, NonNegative
from lit_ft.subspace.projectors.base import (
    BasisInput,
    Projector,
    captured_energy,
    where_informative,
)


def online_pca_gradient(basis: Tensor, sketch: Tensor, *, penalty: float = 0.0) -> Tensor:
    """Return the gradient of Σ_s ||G_s − G_s PᵀP||² / Σ_s ||R_s||² + λ ||PPᵀ − I||².

    The gradient is taken with respect to P. G_s is the gradient of sample s, and R_s = G_s Pᵀ. The
    divisor is held constant, and H is divided by it first. Since H Pᵀ = Σ_s R_sᵀ R_s, the gradient
    is then −4H + 2 (PPᵀ) H + 2 (H Pᵀ) P + 4λ (PPᵀ − I) P. The paper (arXiv:2408.12857, eq. 5)
    divides the first term by the norm of G instead. This changes little, because AdamW steps P, and
    its steps do not depend on the scale of the gradient.

    Args:
        basis: The basis P [r, n].
        sketch: The sketch H [r, n], as `projected_gradient_and_sketch` returns it.
        penalty: The weight λ of the orthonormality term.
    """
    h = sketch / captured_energy(basis, sketch)
    gram = basis @ basis.T
    gradient = -4 * h + 2 * gram @ h + 2 * (h @ basis.T) @ basis
    if penalty:
        gradient = gradient + 4 * penalty * (gram @ basis - basis)
    return gradient


@dataclass(frozen=True)
class Online(Projector):
    """Online subspace descent as in its paper (arXiv:2408.12857): AdamW steps P at its own rate.

    Attributes:
        lr: AdamW's learning rate for P (1 / T in the paper), decayed with the weights' schedule.
        penalty: The weight λ of the orthonormality term (0 in the authors' code).
    """

    basis_input: ClassVar[BasisInput] = BasisInput.SKETCH
    renews: ClassVar[bool] = False
    lr: NonNegative = 0.005
    penalty: NonNegative = 0.0
    starts_from_svd: bool = False
    every: Count = 1
    rotates_moments: bool = False

    def move(
        self,
        basis: Tensor,
        basis_input: Tensor | None,
        *,
        state: dict[str, Tensor],
        decay: float,
        **_: Any,
    ) -> Tensor:
        """Return the basis [r, cols] after one AdamW step on the objective."""
        assert basis_input is not None
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(basis), torch.zeros_like(basis)
            state["step"] = torch.zeros(())
        gradient = online_pca_gradient(basis, basis_input, penalty=self.penalty)
        gradient = where_informative(basis_input, gradient, torch.zeros_like(gradient))
        moved = basis.clone()
        adamw(
            [moved],
            [gradient],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=self.lr * decay,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )
        return moved
