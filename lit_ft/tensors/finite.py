"""Find values that are not finite: NaN or infinite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor
from torch.nn.utils import get_total_norm

from lit_ft.tensors.sharding import local


def seem_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether the norm of this rank's part of all tensors together is finite.

    If it is, all values are. This reads each tensor once and waits for the device once.
    """
    return bool(get_total_norm([values(tensor) for tensor in tensors]).isfinite())


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that are not finite in this rank's part."""
    if seem_finite(tensors.values()):
        return []
    # Looked at one by one, because the norm of finite values may overflow.
    return [name for name, tensor in tensors.items() if not values(tensor).isfinite().all()]


def values(tensor: Tensor) -> Tensor:
    """Return this rank's values, as a view unless `tensor` is sparse and not coalesced."""
    part = local(tensor)
    return part.coalesce().values() if part.is_sparse else part
