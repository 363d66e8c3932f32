"""What one rank holds of a tensor that is spread over the ranks."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def is_sharded(tensor: Tensor) -> bool:
    """Whether ranks hold parts of `tensor`."""
    return isinstance(tensor, DTensor)


def is_spread(model: object) -> bool:
    """Whether ranks hold parts of `model`: what it does, all of them have to do together."""
    return isinstance(model, nn.Module) and (
        isinstance(model, FSDPModule) or any(is_sharded(p) for p in model.parameters())
    )


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
    return first_element(tensor)[0]


def first_element(tensor: Tensor) -> tuple[int, ...]:
    """Return where in the whole the first element of `local(tensor)` is: row, column, ..."""
    if not isinstance(tensor, DTensor):
        return (0,) * max(tensor.ndim, 1)
    _, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(offsets) or (0,)
