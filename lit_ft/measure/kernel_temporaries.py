"""What torch's kernels allocate and free while they run, which no dispatch mode sees."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from lit_ft.measure.live_memory import MemoryTracker

_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_GATHER, _REDUCE_SCATTER = "c10d::_allgather_base_", "c10d::_reduce_scatter_base_"
_ROWS = 128  # to which flash attention rounds up the tokens of its accumulator
_CUDA_GRANULE = 512  # torch's allocator on CUDA gives out multiples of it


def tracker_on(device_type: str, *, alone: bool = False, **options: Any) -> MemoryTracker:
    """Return a tracker that counts as the allocator and the kernels of a device do.

    Args:
        device_type: The type of the device; all that are not "cpu" count as "cuda" does.
        alone: Whether memory on other devices does not count.
        **options: Further arguments of `MemoryTracker`.
    """
    only = device_type if alone else None
    if device_type == "cpu":
        return MemoryTracker(temporaries=on_cpu, device_type=only, **options)
    options = {"granule": _CUDA_GRANULE, **options}
    return MemoryTracker(temporaries=on_cuda, device_type=only, **options)


def on_cpu(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Return the bytes that an operation allocates for itself on the CPU.

    An elementwise operation on tensors of different dtypes first copies those that are not of the
    common dtype. If it works in place, it also has a copy of its result. Gloo gathers into a copy
    of the output, and reduces a copy of the input (ProcessGroupGloo.cpp in torch).
    """
    name: str = func._schema.name
    if name in (_GATHER, _REDUCE_SCATTER):
        output, given, *_ = args
        copied: Tensor = output if name == _GATHER else given
        return copied.nbytes
    if torch.Tag.pointwise not in func.tags:
        return 0
    tensors = [value for value in args if isinstance(value, Tensor) and value.ndim]
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) < 2:
        return 0
    common = reduce(torch.promote_types, dtypes)
    cast = sum(t.numel() for t in tensors if t.dtype is not common)
    in_place = name.endswith("_") and tensors[0].dtype is not common
    return (cast + tensors[0].numel() * in_place) * common.itemsize


def on_cuda(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Return the bytes that an operation allocates for itself on a CUDA GPU.

    The backward pass of flash attention 2 sums the gradient of the queries in float32, and with
    grouped queries it has the gradients of keys and values once for each head of the queries
    (mha_bwd in aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp). On fake tensors,
    the operation is the one of the CPU.
    """
    if func is not _FLASH_BACKWARD:
        return 0
    _, query, key, *_ = args
    batch, heads, tokens, width = query.shape
    rounded = -(-tokens // _ROWS) * _ROWS
    summed = batch * heads * rounded * (width + 1) * 4
    grouped = key.shape[1] != heads
    temporary: int = summed + grouped * 2 * batch * heads * key.shape[2] * width * key.itemsize
    return temporary
