"""The learning rate at which a method is compared."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence


def best_rate(losses: Mapping[float, Sequence[float]]) -> float | None:
    """Return the rate with the lowest mean loss, among those that ran with the most seeds.

    Args:
        losses: The held-out losses of all seeds, keyed by rate.
    """
    most = max(map(len, losses.values()), default=0)
    means = {rate: statistics.mean(found) for rate, found in losses.items() if len(found) == most}
    return min(means, key=lambda rate: means[rate], default=None)
