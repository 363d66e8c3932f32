"""Embeddings in a subspace."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lit_ft.subspace.layers.autograd import thin_backward
from lit_ft.subspace.layers.base import SubspaceLayer
from lit_ft.subspace.layers.energy import captured_and_total_energy


class SubspaceEmbedding(SubspaceLayer, nn.Embedding):
    """`nn.Embedding` whose weight [V, d] moves in a subspace. The basis always spans d."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of W [..., T, d] for the token ids `input` [..., T]."""
        if not torch.is_grad_enabled():
            return F.embedding(input, self.weight)
        return _Embedding.apply(  # type: ignore[no-any-return, no-untyped-call]
            input, self.weight, self.delta, self.basis, self.energy, self.padding_idx
        )


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        weight: Tensor,
        delta: Tensor,
        basis: Tensor,
        energy: Tensor,
        padding_idx: int | None,
    ) -> Tensor:
        ctx.padding_idx, ctx.num_rows = padding_idx, len(weight)
        ctx.dtypes = (weight.dtype, delta.dtype)
        ctx.needs_sketch, ctx.needs_weight = basis.requires_grad, weight.requires_grad
        ctx.needs_energy = energy.requires_grad
        ctx.save_for_backward(ids, basis)
        return F.embedding(ids, weight)

    @staticmethod
    @thin_backward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ids, basis = ctx.saved_tensors
        weight_dtype, delta_dtype = ctx.dtypes
        grad = grad.to(basis.dtype)
        if ctx.padding_idx is not None:
            grad = grad.masked_fill((ids == ctx.padding_idx)[..., None], 0)
        in_basis = grad @ basis.T
        gradient = _scatter(ids, in_basis, ctx.num_rows)
        weight_gradient = sketch = energy = None
        # If there are no sequences, each id is a sample.
        sequences = ids.reshape(-1, ids.shape[-1] if ids.ndim > 1 else 1)
        if ctx.needs_sketch:
            of_ids = _sums_of_ids(sequences, in_basis.reshape(*sequences.shape, -1))  # R_s[id_t]
            sketch = of_ids.reshape(-1, len(basis)).T @ grad.reshape(-1, grad.shape[-1])
        if ctx.needs_energy:
            cols, cols_in_basis = (t.reshape(*sequences.shape, -1) for t in (grad, in_basis))
            energy = captured_and_total_energy(sequences, cols, cols_in_basis, basis)
        if ctx.needs_weight:
            weight_gradient = _scatter(ids, grad, ctx.num_rows).to(weight_dtype)
        return None, weight_gradient, gradient.to(delta_dtype), sketch, energy, None


def _scatter(ids: Tensor, values: Tensor, num_rows: int) -> Tensor:
    """Return [num_rows, k]: row i is the sum of the `values` [..., k] whose id in `ids` is i."""
    flat = values.reshape(-1, values.shape[-1])
    return flat.new_zeros(num_rows, flat.shape[1]).index_add_(0, ids.reshape(-1), flat)


def _sums_of_ids(ids: Tensor, values: Tensor) -> Tensor:
    """Return, for each token, the sum of `values` over all tokens of its sequence with that id.

    Args:
        ids: The token ids [S, T].
        values: The values to sum [S, T, k].

    Returns:
        The sums [S, T, k].
    """
    # Each id is replaced by its first position in the sorted sequence, a number below T.
    places = torch.searchsorted(ids.sort(-1).values, ids)[..., None].expand_as(values)
    return torch.zeros_like(values).scatter_add_(1, places, values).gather(1, places)
