"""Sharded tensors: the part that this rank holds, and the whole tensor.

Tensors may have any shape; their rows are counted along the first dimension.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is sharded over ranks, which means that it is a DTensor."""
    return isinstance(tensor, DTensor)


def is_model_sharded(model: object) -> bool:
    """Whether `model` is sharded over ranks, so that all ranks must run it together."""
    return isinstance(model, nn.Module) and (
        isinstance(model, FSDPModule) or any(is_sharded(p) for p in model.parameters())
    )


def fsdp_root(model: nn.Module) -> FSDPModule | None:
    """Return the outermost FSDP2 module: `model` or a module inside it; None if there is none."""
    return next((module for module in model.modules() if isinstance(module, FSDPModule)), None)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of `tensor`, or all of it if it is not sharded; it has no history."""
    held = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return held.detach() if held.requires_grad else held


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole `tensor`, gathered from the ranks if it is sharded."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return `tensor` sharded as `like` is, or `tensor` itself if `like` is not sharded.

    `tensor` must be whole on every rank, so that nothing has to be sent.
    """
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def holds_whole_rows(tensor: Tensor) -> bool:
    """Whether ranks hold only whole rows of `tensor`: it is sharded by rows, or not sharded."""
    return not isinstance(tensor, DTensor) or not any(
        placement.is_shard() and not placement.is_shard(0) for placement in tensor.placements
    )


def first_row(tensor: Tensor) -> int:
    """Return the index of the first row of `local(tensor)` in the whole tensor."""
    return first_element(tensor)[0]


def first_element(tensor: Tensor) -> tuple[int, ...]:
    """Return the index (row, column, ...) in the whole tensor at which `local(tensor)` starts."""
    if not isinstance(tensor, DTensor):
        return (0,) * max(tensor.ndim, 1)
    _, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(offsets) or (0,)


def added_over_ranks(sums: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Add up each of `sums` over the ranks that share its tensor, and return the totals.

    The sums travel in one message if the same ranks share all tensors.

    Args:
        sums: This rank's sums, one for each tensor, each over the rows that this rank holds. A sum
            is 1-D, and has the same length on every rank.
        tensors: The tensor that each sum belongs to, sharded by rows or not at all. The sum of a
            tensor that is not sharded is already complete.
    """
    totals = list(sums)
    messages: dict[Any, list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        if isinstance(tensor, DTensor):
            for dim, placement in enumerate(tensor.placements):
                if placement.is_shard():
                    group = tensor.device_mesh.get_group(dim)
                    messages[group, totals[index].dtype, totals[index].device].append(index)
    for (group, *_), indices in messages.items():
        message = torch.cat([totals[index] for index in indices])
        dist.all_reduce(message, group=group)
        parts = torch.split(message, [totals[index].numel() for index in indices])
        for index, total in zip(indices, parts, strict=True):
            totals[index] = total
    return totals
