"""Whether two runs end with the same weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor


def read_weights(file: Path) -> dict[str, Tensor]:
    """Read the weights that a row has written."""
    found: dict[str, Tensor] = torch.load(file, weights_only=True)
    return found


def largest_difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Return the largest difference of a tensor, relative to its largest value; 0.0 if bit-equal.

    It is infinite if any difference is not finite, since no other number says that they differ.

    Raises:
        ValueError: If the names differ.
    """
    if one.keys() != other.keys():
        raise ValueError(f"only one has {sorted(one.keys() ^ other.keys())[:3]}")
    return max((_difference(one[name], other[name]) for name in one), default=0.0)


def _difference(one: Tensor, other: Tensor) -> float:
    if torch.equal(one, other):
        return 0.0
    apart = (one.double() - other.double()).abs().max()
    share = float(apart / other.double().abs().max())
    return share if math.isfinite(share) else math.inf  # max() would pass over NaN
