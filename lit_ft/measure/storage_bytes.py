"""The bytes that a set of tensors occupies, with shared memory counted once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of memory that `tensors` occupy on this rank.

    Tied tensors and views of the same memory count once. Of a wrapper subclass, such as torchao's
    quantised states, the tensors inside it count; of a DTensor, the local shard. Tensors on the
    meta device count with the bytes that they would occupy.
    """
    pieces: dict[int, set[tuple[int, int]]] = {}
    sizes: dict[int, int] = {}
    alive: list[torch.UntypedStorage] = []  # so that no address is reused while they are counted
    for tensor in tensors:
        for plain in _plain_tensors(tensor):
            storage = plain.untyped_storage()
            alive.append(storage)
            # Not data_ptr(): it is 0 for every meta tensor.
            key = storage._cdata
            nbytes = plain.numel() * plain.element_size()
            pieces.setdefault(key, set()).add((int(plain.storage_offset()), nbytes))
            sizes[key] = storage.nbytes()
    # Views may overlap or repeat; they never occupy more than the storage they look into.
    return sum(min(sum(n for _, n in found), sizes[key]) for key, found in pieces.items())


@cache
def is_wrapper(kind: type) -> bool:
    """Whether a class of tensors wraps others, as DTensor and torchao's quantised states do."""
    return hasattr(kind, "__tensor_flatten__")


def _plain_tensors(tensor: Any) -> Iterator[Tensor]:
    if not isinstance(tensor, Tensor):
        return  # a DTensor's parts are its local tensor and its mesh
    if is_wrapper(type(tensor)):
        wrapper: Any = tensor
        for name in wrapper.__tensor_flatten__()[0]:
            yield from _plain_tensors(getattr(tensor, name))
    else:
        yield tensor
