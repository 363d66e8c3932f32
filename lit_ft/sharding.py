"""What one rank holds of a tensor whose rows FSDP2 spreads over the ranks."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def is_sharded(tensor: Tensor) -> bool:
    """Whether ranks hold parts of `tensor`."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's rows, all of them where nothing is sharded; writes go through."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def whole(tensor: Tensor) -> Tensor:
    """Return all rows, gathered from the ranks where they are sharded."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def holds_whole_rows(tensor: Tensor) -> bool:
    """Whether ranks share `tensor` by its rows, or not at all."""
    return not isinstance(tensor, DTensor) or not any(
        placement.is_shard() and not placement.is_shard(0) for placement in tensor.placements
    )


def first_row(tensor: Tensor) -> int:
    """Return which row of the whole is the first of `local(tensor)`."""
    if not isinstance(tensor, DTensor):
        return 0
    _, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return offsets[0]
