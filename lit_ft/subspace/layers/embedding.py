"""Embeddings in a subspace."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lit_ft.subspace.layers.autograd import thin_backward
from lit_ft.subspace.layers.base import SubspaceLayer
from lit_ft.subspace.layers.energy import captured_and_total_energy


class SubspaceEmbedding(SubspaceLayer, nn.Embedding):
    """`nn.Embedding` whose weight [V, d] moves in a subspace. The basis always spans d.

    A subclass of `nn.Embedding` keeps its own `forward`, such as that of Gemma, which multiplies
    the rows by a constant. Its `super().forward` is then the lookup of this class. Autograd
    differentiates what the subclass does with the rows, so the gradient that arrives here is that
    of the rows of W.
    """

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether `module` is an `nn.Embedding` that uses its weight only in its base lookup.

        A subclass is run on the meta device with a lookup that ignores the weight, and fits if its
        output does not depend on the weight then. Without values, its `forward` cannot treat some
        ids differently, so this holds for all ids. A subclass does not fit if it has modules of its
        own, or if its `forward` fails on the meta device.
        """
        if type(module) is nn.Embedding:
            return True
        return isinstance(module, nn.Embedding) and _only_looks_up(module)

    @staticmethod
    def around(kind: type[nn.Embedding]) -> type[SubspaceEmbedding]:
        """Return the class of `kind` in a subspace, whose `forward` is that of `kind`."""
        if kind is nn.Embedding:
            return SubspaceEmbedding
        return _with_lookup_of(SubspaceEmbedding, kind)

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of W [..., T, d] for the token ids `input` [..., T]."""
        if not torch.is_grad_enabled():
            return F.embedding(input, self.weight)
        return _Embedding.apply(  # type: ignore[no-any-return, no-untyped-call]
            input, self.weight, self.delta, self.basis, self.energy, self.padding_idx
        )


class _OtherRows(nn.Embedding):
    """Looks up rows that have nothing to do with the weight, and counts the lookups."""

    num_lookups = 0

    def forward(self, input: Tensor) -> Tensor:
        if input.is_floating_point():
            raise TypeError("The ids of an embedding are integers.")
        self.num_lookups += 1
        return self.weight.new_zeros(*input.shape, self.embedding_dim)


def _with_lookup_of(base: type[Any], kind: type[nn.Embedding]) -> type[Any]:
    """Return a subclass of `kind` in which the `super().forward` of `kind` is that of `base`."""
    # Python looks for the next `forward` along the order of classes: kind, base, nn.Embedding.
    return type(f"Subspace{kind.__name__}", (kind, base), {"__module__": __name__})


def _only_looks_up(module: nn.Embedding) -> bool:
    if any(True for _ in module.children()):  # they could use the weight too
        return False
    # As many as there are rows: float numbers of this shape could be a mixture of all rows.
    ids = torch.zeros(2, module.num_embeddings, dtype=torch.int64, device="meta")
    try:
        if not all(_is_lookup(module, ids, training=training) for training in (True, False)):
            return False
    except Exception:  # whatever a stranger's forward raises, nothing is proven
        return False
    with suppress(Exception):  # the lookup itself refuses numbers that are no ids
        return _is_lookup(module, ids.float(), training=True)
    return True


def _is_lookup(module: nn.Embedding, ids: Tensor, *, training: bool) -> bool:
    """Whether the output for `ids` comes from a base lookup, and from the weight in no other way.

    Raises whatever the module's `forward` raises on the meta device.
    """
    kind, twin = type(module), copy.copy(module)
    twin.__class__ = _with_lookup_of(_OtherRows, kind)
    twin.training = training
    copies: dict[Tensor, Tensor] = {}  # two names of one tensor stay two names of one tensor
    for store in ("_parameters", "_buffers"):
        tensors = vars(module)[store].items()
        vars(twin)[store] = {
            name: tensor if tensor is None else copies.setdefault(tensor, _on_meta(tensor))
            for name, tensor in tensors
        }
    twin.weight.requires_grad_(True)
    with torch.enable_grad():
        out = kind.forward(twin, ids)  # not `twin(ids)`, which would run the module's hooks
        if not twin.num_lookups:
            return False
        if not out.requires_grad:
            return True
        return torch.autograd.grad(out.sum(), twin.weight, allow_unused=True)[0] is None


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


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
        basis = basis.to(torch.promote_types(basis.dtype, torch.float32))
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
