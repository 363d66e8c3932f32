"""Linear layers in a subspace."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lit_ft.subspace.layers.autograd import thin_backward
from lit_ft.subspace.layers.base import Side, SubspaceLayer
from lit_ft.subspace.layers.energy import captured_and_total_energy
from lit_ft.subspace.layers.products import projected_gradient, projected_gradient_and_sketch


class SubspaceLinear(SubspaceLayer, nn.Linear):
    """`nn.Linear` whose weight moves in a subspace; the bias is an ordinary parameter."""

    def forward(self, input: Tensor) -> Tensor:
        """Return x Wᵀ + b [..., out], for x = `input` [..., in]."""
        if not torch.is_grad_enabled():
            return F.linear(input, self.weight, self.bias)
        return subspace_linear(
            input,
            self.weight,
            self.bias,
            delta=self.delta,
            basis=self.basis,
            energy=self.energy,
            side=self.side,
        )


def subspace_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    delta: Tensor,
    basis: Tensor,
    energy: Tensor,
    side: Side,
) -> Tensor:
    """Return x Wᵀ + b [..., out]; backward computes R and all other gradients that are required.

    Args:
        x: The input [..., in].
        weight: The weight W [out, in]. It receives its whole gradient if it requires one.
        bias: The bias [out], or None for a layer without bias.
        delta: The parameter S [rows, r], which is zero. It receives R as its gradient.
        basis: The basis P [r, cols]. It receives the sketch H, in float32 or wider, if it requires
            a gradient.
        energy: A tensor [2]. It receives the captured and the total energy if it requires a
            gradient.
        side: The side that P spans; see `SubspaceLayer`.
    """
    return _Linear.apply(x, weight, bias, delta, basis, energy, side)  # type: ignore[no-any-return, no-untyped-call]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        delta: Tensor,
        basis: Tensor,
        energy: Tensor,
        side: str,
    ) -> Tensor:
        out = F.linear(x, weight, bias)
        ctx.side, ctx.dtypes = side, (x.dtype, delta.dtype)
        ctx.needs_sketch, ctx.needs_weight = basis.requires_grad, weight.requires_grad
        # On the right side, all that R needs of X [..., n] is X Pᵀ [..., r].
        x_in_basis = x.to(out.dtype) @ basis.T.to(out.dtype) if side == "right" else None
        ctx.needs_energy = energy.requires_grad
        keep_x = side == "left" or ctx.needs_sketch or ctx.needs_energy or ctx.needs_weight
        ctx.save_for_backward(x if keep_x else None, x_in_basis, weight, basis)
        return out

    @staticmethod
    @thin_backward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x: Any  # None where it is not needed
        x, x_in_basis, weight, basis = ctx.saved_tensors
        dtype = grad.dtype  # that of the forward product
        x_dtype, delta_dtype = ctx.dtypes
        x = x if x is None else x.to(dtype)
        rows: Any
        cols: Any
        grad_x = grad_bias = grad_weight = sketch = energy = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight.to(dtype)).to(x_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        if ctx.needs_weight:
            grad_weight = projected_gradient(grad, x).to(weight.dtype)
        if ctx.side == "right":
            rows, cols, cols_in_basis = grad, x, x_in_basis
        else:
            rows, cols, cols_in_basis = x, grad, grad @ basis.T.to(dtype)
        if ctx.needs_sketch:
            gradient, sketch = projected_gradient_and_sketch(rows, cols, cols_in_basis)
        else:
            gradient = projected_gradient(rows, cols_in_basis)
        if ctx.needs_energy:
            energy = captured_and_total_energy(rows, cols, cols_in_basis, basis)
        return grad_x, grad_weight, grad_bias, gradient.to(delta_dtype), sketch, energy, None
