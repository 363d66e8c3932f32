"""8-bit moments as plain tensors: one code per element, and one scale per block of a row."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_ft.tensors.sharding import holds_whole_rows, local

if TYPE_CHECKING:
    from torchao.optim.subclass_8bit import OptimState8bit

# bitsandbytes' numbers: the largest block, and the smallest tensor that is worth quantising.
_BLOCK, _MIN_ELEMENTS = 256, 4096
# In smaller blocks the scale takes too large a share of the bytes.
_MIN_BLOCK = 16


def zeros_8bit(name: str, like: Tensor) -> dict[str, Tensor]:
    """Return the state entries of a moment that is zero, in the shape of `like`.

    The entries are `name`, uint8 codes in the shape of `like`, and `<name>_scale`, float32 scales
    [..., columns / block]. Both are sharded as `like` is. No block crosses the end of a row, so the
    values do not depend on how the rows are sharded. Small tensors, and tensors whose rows do not
    divide into blocks of 16 to 256 elements, are kept in float32, without a scale.

    Args:
        name: The name of the moment in the optimizer's state. A name that ends in "_sq" is that of
            a second moment, whose codes are unsigned.
        like: The parameter [..., columns], sharded by rows or not at all.

    Raises:
        ValueError: If `like` is sharded by its columns.
    """
    if not holds_whole_rows(like):
        raise ValueError(
            "8-bit state needs whole rows, and ranks share a parameter by columns: shard it by "
            "rows."
        )
    like = like.detach()
    columns = like.shape[-1] if like.ndim else 1
    block = next(size for size in range(min(_BLOCK, columns), 0, -1) if columns % size == 0)
    if like.ndim < 2 or like.numel() < _MIN_ELEMENTS or block < _MIN_BLOCK:
        return {name: torch.zeros_like(like, dtype=torch.float32)}
    zeros = partial(torch.zeros_like, memory_format=torch.contiguous_format)
    scales = zeros(like.narrow(-1, 0, columns // block), dtype=torch.float32)
    return {name: zeros(like, dtype=torch.uint8), f"{name}_scale": scales}


def as_float(name: str, state: Mapping[str, Any]) -> Tensor | OptimState8bit:
    """Return this rank's part of a moment [rows, ...], which can be read and written as float32.

    Args:
        name: The name of the moment in `state`, which ends in "_sq" for a second moment.
        state: The optimizer's state for one parameter, or for some of its rows.
    """
    moment = local(state[name])
    if f"{name}_scale" not in state:
        return moment
    if not moment.numel():  # fewer rows than ranks
        return moment.float()
    from torchao.optim.subclass_8bit import OptimState8bit

    signed = not name.endswith("_sq")
    scale = local(state[f"{name}_scale"]).view(-1)
    # These are views: writing to the result writes to `state`.
    return OptimState8bit(moment, scale, _code_book(signed, moment.device), signed, torch.float32)


@cache
def _code_book(signed: bool, device: torch.device) -> Tensor:
    from torchao.optim.subclass_8bit import get_qmap_signed, get_qmap_unsigned

    return torch.tensor(get_qmap_signed() if signed else get_qmap_unsigned(), device=device)
