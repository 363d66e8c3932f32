"""Split a matrix and its optimizer state into blocks of rows, for work that needs extra memory."""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd, prod
from typing import Any

import torch
from torch import Tensor

# The number of elements in a piece: on the CPU, a piece then fits in the cache; on a GPU, fewer
# pieces mean fewer kernel launches.
_ON_CPU, _ELSEWHERE = 2**20, 2**24
# bitsandbytes quantises moments in blocks of this many elements, each with its own maximum.
_BLOCK = 256


def row_blocks(matrix: Tensor, *, at_most: int = _ELSEWHERE) -> list[slice]:
    """Split the rows of `matrix` [m, ...] into pieces of about 2^20 elements (2^24 on a GPU).

    A small matrix is one piece. Every piece but the last holds whole blocks of 256 elements.

    Args:
        matrix: The matrix to split.
        at_most: The largest number of elements of a piece on any device.
    """
    elements = min(_elements(matrix.device), at_most)
    if matrix.ndim == 0 or matrix.numel() <= elements:
        return [slice(None)]
    rows, columns = len(matrix), matrix.numel() // len(matrix)
    size = _rows(columns, elements)
    # A short remainder joins the last piece: bitsandbytes treats the state of tiny tensors apart.
    starts = range(0, max(rows - size // 2, 1), size)
    return [slice(start, start + size) for start in starts[:-1]] + [slice(starts[-1], rows)]


def rows_per_block(columns: int, device: torch.device) -> int:
    """Return how many rows of `columns` elements make up one piece on `device`."""
    return _rows(columns, _elements(device))


def rows_of(state: Mapping[str, Any], shape: tuple[int, ...], rows: slice) -> dict[str, Any]:
    """Return the part of an optimizer's state that belongs to some rows of a parameter.

    Tensors of the parameter's shape, those with a number for each row (`..._row`) and the scales of
    quantised blocks are returned as views. Other entries, such as counters and code books, are
    returned unchanged.

    Args:
        state: The optimizer's state for the whole parameter.
        shape: The shape of the whole parameter.
        rows: The rows of the parameter to return the state of, as a slice from `row_blocks`.
    """
    parts = {key: _part(key, value, shape, rows) for key, value in state.items()}
    return {key: state[key] if part is None else state[key][part] for key, part in parts.items()}


def put_rows(
    state: dict[str, Any], part: Mapping[str, Any], shape: tuple[int, ...], rows: slice
) -> None:
    """Write the state of some rows back into the state of the whole parameter.

    This is the inverse of `rows_of`. Entries missing from `state` are created with room for all
    rows. Entries that are not kept by row are replaced.

    Args:
        state: The optimizer's state for the whole parameter, changed in place.
        part: The optimizer's state for the rows in `rows`.
        shape: The shape of the whole parameter.
        rows: The rows of the parameter that `part` belongs to, as a slice from `row_blocks`.
    """
    size = len(range(*rows.indices(shape[0]))), *shape[1:]
    for key, value in part.items():
        if key not in state and (blocks := _part(key, value, size, slice(None))) is not None:
            by_row = (shape[0], *value.shape[1:])
            whole = by_row if blocks == slice(None) else (-(-prod(shape) // _BLOCK),)
            state[key] = value.new_empty(whole)
        taken = _part(key, state.get(key), shape, rows)
        if taken is None:
            state[key] = value
        elif (place := state[key][taken]).data_ptr() != value.data_ptr():
            place.copy_(value)


def _rows(columns: int, elements: int) -> int:
    step = _BLOCK // gcd(_BLOCK, columns)
    return max(elements // columns // step, 1) * step


def _elements(device: torch.device) -> int:
    return _ON_CPU if device.type == "cpu" else _ELSEWHERE


def _part(key: str, value: Any, shape: tuple[int, ...], rows: slice) -> slice | None:
    """Return the part of a state's entry that belongs to `rows`; None if it is not kept by row."""
    if not isinstance(value, Tensor):
        return None
    # For the scales see lit_ft.tensors.quantized_state.
    if value.shape == shape or key.endswith(("_row", "_scale")):
        return rows
    if key.startswith("absmax"):
        start, stop, _ = rows.indices(shape[0])
        columns = prod(shape[1:])
        first, end = start * columns, stop * columns
        return slice(first // _BLOCK, -(-end // _BLOCK))
    return None
