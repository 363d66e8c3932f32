"""How much of a gradient a basis captures, without forming the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

# Entries that a product of tokens with tokens has at a time, and blocks that it has at least.
_BLOCK_ENTRIES = 1 << 24
_BLOCKS = 4


def captured_and_total_energy(
    rows: Tensor, cols: Tensor, cols_in_basis: Tensor, basis: Tensor
) -> Tensor:
    """Return Σ_s ||G_s Π||² and Σ_s ||G_s||² over the samples s of the batch.

    Π = Pᵀ (P Pᵀ)⁻¹ P projects on the span of the basis. Since G_s = Σ_t rows_t ⊗ cols_t,
    ||G_s||² = Σ_tu (rows_t · rows_u) (cols_t · cols_u); the captured part has `cols` in the span.
    With orthonormal P it is tr(H Pᵀ), H being the sketch, whose samples these are. A sequence costs
    about T² (m + n + r) / 2 multiply-adds.

    Args:
        rows: [..., T, m] per token; leading dimensions enumerate sequences, each of them a sample.
            [S, m], without sequences, is S samples. Of an embedding the ids [..., T], which stand
            for one-hot rows.
        cols: [..., T, n] or [S, n], likewise.
        cols_in_basis: [..., T, r] or [S, r], `cols` in the basis: cols Pᵀ.
        basis: P [r, n].

    Returns:
        [2], in the dtype of the basis.
    """
    wide = torch.float32 if cols.dtype is torch.float16 else cols.dtype  # squares leave its range
    rows = rows.to(wide) if rows.is_floating_point() else rows[..., None]
    cols, cols_in_basis = cols.to(wide), cols_in_basis.to(wide)
    length = cols.shape[-2] if cols.ndim > 2 else 1
    rows, cols, cols_in_basis = (
        t.reshape(-1, length, t.shape[-1]) for t in (rows, cols, cols_in_basis)
    )
    # Not `inv`: it waits for the device to say that it went well.
    span = cols_in_basis @ torch.linalg.inv_ex(basis @ basis.T).inverse.to(wide)
    energy = basis.new_zeros(2)
    size = max(1, min(_BLOCK_ENTRIES // max(1, len(cols) * length), -(-length // _BLOCKS)))
    for begin in range(0, length, size):
        block, so_far = slice(begin, begin + size), slice(begin + size)
        if rows.is_floating_point():
            of_rows = rows[:, block] @ rows[:, so_far].mT
        else:
            of_rows = (rows[:, block] == rows[:, so_far].mT).to(wide)
        of_rows[..., :begin] *= 2  # for (t, u) and (u, t)
        of_cols = cols[:, block] @ cols[:, so_far].mT
        captured = span[:, block] @ cols_in_basis[:, so_far].mT
        energy[0] += (of_rows * captured).sum(dtype=basis.dtype)
        energy[1] += (of_rows * of_cols).sum(dtype=basis.dtype)
    return energy
