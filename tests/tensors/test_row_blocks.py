"""Blocks of rows cover a matrix, in whole blocks of 256 values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_ft.tensors import row_blocks as row_blocks


@given(rows=st.integers(1, 3000), columns=st.integers(1, 700), limit=st.integers(256, 20_000))
def test_pieces_cover_the_rows_in_whole_blocks(rows: int, columns: int, limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_blocks, "_ON_CPU", limit)
        pieces = row_blocks.row_blocks(torch.empty(rows, columns, device="cpu"))
    sizes = [len(range(*piece.indices(rows))) for piece in pieces]
    covered = [row for piece in pieces for row in range(*piece.indices(rows))]
    assert covered == list(range(rows))
    assert all(size * columns % 256 == 0 for size in sizes[:-1])
    # Rounded up to whole blocks a piece may have to be larger than asked for: 256 rows at most.
    assert all(size * columns <= max(1.5 * limit, 1.5 * 256 * columns) for size in sizes)
    assert 2 * sizes[-1] >= sizes[0]
