"""Clocks and medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable

import torch


def now(device: torch.device) -> float:
    """Return the seconds of a clock, once the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def spread(values: Iterable[float]) -> dict[str, float]:
    """Return median, min and max of some values."""
    listed = list(values)
    return {"median": statistics.median(listed), "min": min(listed), "max": max(listed)}


def median_ratio(above: Iterable[float], below: Iterable[float]) -> float:
    """Return the median of `above / below`, pair by pair."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))
