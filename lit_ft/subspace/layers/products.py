"""Thin products of a weight gradient G = Yᵀ X, computed without forming it."""

from __future__ import annotations

import torch
from torch import Tensor


def projected_gradient(rows: Tensor, cols_in_basis: Tensor) -> Tensor:
    """Return R = Σ_t rows_t ⊗ cols_in_basis_t, the gradient in the coordinates of the basis.

    Args:
        rows: The row factors of the tokens [..., m]. If the basis spans the inputs, these are the
            output gradients Y.
        cols_in_basis: The column factors of the tokens in the coordinates of the basis [..., r].
            If the basis spans the inputs, these are X Pᵀ.

    Returns:
        The projected gradient R [m, r], in the dtype of the arguments.
    """
    return rows.reshape(-1, rows.shape[-1]).T @ cols_in_basis.reshape(-1, cols_in_basis.shape[-1])


def projected_gradient_and_sketch(
    rows: Tensor, cols: Tensor, cols_in_basis: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the projected gradient R = Σ_s R_s and the sketch H = Σ_s R_sᵀ G_s.

    The sums run over the samples s of the batch. G_s is the gradient of a sample, and R_s = G_s Pᵀ.
    Projectors that follow the data move the basis by H. Because H is a sum over samples, it is the
    same however the batch is cut into micro-batches and ranks. The product Rᵀ G of the summed
    gradients is not. Since H Pᵀ = Σ_s R_sᵀ R_s, the trace of H Pᵀ is the energy that the basis
    captures.

    Args:
        rows: The row factors of the tokens. With three dimensions or more, [..., T, m], each
            sequence of T tokens is a sample. In [S, m], each of the S tokens is a sample, and [m]
            is a single sample.
        cols: The column factors of the tokens, [..., T, n], [S, n] or [n].
        cols_in_basis: The column factors of the tokens in the coordinates of the basis (`cols` Pᵀ),
            [..., T, r], [S, r] or [r].

    Returns:
        R [m, r] in the dtype of the arguments, and H [r, n], summed over samples in float32 or
        wider. With float16 arguments, the products for H are taken in float32 too, because the
        square of a scaled loss exceeds the range of float16.
    """
    wide = torch.float32 if rows.dtype is torch.float16 else rows.dtype
    if rows.ndim < 3:  # R_s = y_s ⊗ P x_s, hence R_sᵀ G_s = ||y_s||² P x_s ⊗ x_s
        energy = rows.to(wide).square().sum(-1, keepdim=True)
        sketch = projected_gradient(cols_in_basis.to(wide) * energy, cols.to(wide))
        return projected_gradient(rows, cols_in_basis), sketch
    rows, cols, cols_in_basis = (t.reshape(-1, *t.shape[-2:]) for t in (rows, cols, cols_in_basis))
    # Few enough samples at a time that R_s [S, m, r] takes at most a quarter of G [m, n].
    size = max(1, cols.shape[-1] // (4 * cols_in_basis.shape[-1]))
    summed = torch.promote_types(rows.dtype, torch.float32)
    gradient: Tensor | None = None
    sketch = cols.new_zeros(cols_in_basis.shape[-1], cols.shape[-1], dtype=summed)
    pieces = (torch.split(tensor, size) for tensor in (rows, cols, cols_in_basis))
    for y, x, x_in_basis in zip(*pieces, strict=True):
        by_sample = y.mT @ x_in_basis
        # The rows of a head are many: no copy of R where there is one sample.
        part = by_sample[0] if len(by_sample) == 1 else by_sample.sum(0)
        gradient = part if gradient is None else gradient.to(summed) + part
        sketch += projected_gradient(y.to(wide) @ by_sample.to(wide), x.to(wide))
    assert gradient is not None  # no samples are one piece
    return gradient.to(rows.dtype), sketch
