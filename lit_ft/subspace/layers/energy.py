"""Compute how much of a gradient's energy a basis captures, without forming the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

# The most entries of a [tokens, tokens] product to hold at once, and the fewest blocks to make.
_BLOCK_ENTRIES = 1 << 24
_BLOCKS = 4


def captured_and_total_energy(
    rows: Tensor, cols: Tensor, cols_in_basis: Tensor, basis: Tensor
) -> Tensor:
    """Return Σ_s ||G_s Π||² and Σ_s ||G_s||² over the samples s of the batch.

    G_s is the gradient of sample s, and Π = Pᵀ (P Pᵀ)⁻¹ P projects onto the span of the basis.
    Since G_s = Σ_t rows_t ⊗ cols_t, ||G_s||² = Σ_tu (rows_t · rows_u) (cols_t · cols_u), as in
    ghost clipping (arXiv:2110.05679). For the captured energy, `cols` are projected onto the span.
    With orthonormal P, the captured energy is tr(H Pᵀ), where H is the sketch over the same
    samples. A sequence costs about T² (m + n + r) / 2 multiply-adds.

    Args:
        rows: The row factors of the tokens [..., T, m]. The leading dimensions enumerate sequences,
            each of which is one sample. If there are no sequences, [S, m] is S samples. For an
            embedding, give the ids [..., T], which stand for one-hot rows.
        cols: The column factors of the same tokens, [..., T, n] or [S, n].
        cols_in_basis: The column factors in the basis, `cols` Pᵀ, [..., T, r] or [S, r].
        basis: The basis P [r, n].

    Returns:
        The captured and the total energy [2], in the dtype of the basis, or in float32 if that is
        wider.
    """
    basis = basis.to(torch.promote_types(basis.dtype, torch.float32))
    # float16 cannot hold the squares.
    wide = torch.float32 if cols.dtype is torch.float16 else cols.dtype
    rows = rows.to(wide) if rows.is_floating_point() else rows[..., None]
    cols, cols_in_basis = cols.to(wide), cols_in_basis.to(wide)
    length = cols.shape[-2] if cols.ndim > 2 else 1
    rows, cols, cols_in_basis = (
        t.reshape(-1, length, t.shape[-1]) for t in (rows, cols, cols_in_basis)
    )
    # `inv` would wait for the device to report success.
    span = cols_in_basis @ torch.linalg.inv_ex(basis @ basis.T).inverse.to(wide)
    energy = basis.new_zeros(2)
    size = max(1, min(_BLOCK_ENTRIES // max(1, len(cols) * length), -(-length // _BLOCKS)))
    for begin in range(0, length, size):
        block, so_far = slice(begin, begin + size), slice(begin + size)
        if rows.is_floating_point():
            of_rows = rows[:, block] @ rows[:, so_far].mT
        else:
            of_rows = (rows[:, block] == rows[:, so_far].mT).to(wide)
        of_rows[..., :begin] *= 2  # once for (t, u) and once for (u, t)
        of_cols = cols[:, block] @ cols[:, so_far].mT
        captured = span[:, block] @ cols_in_basis[:, so_far].mT
        energy[0] += (of_rows * captured).sum(dtype=basis.dtype)
        energy[1] += (of_rows * of_cols).sum(dtype=basis.dtype)
    return energy
