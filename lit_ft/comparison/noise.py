"""Whether the difference between two methods is more than the noise of their seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

RULE = (
    "A row is within noise of the best one if the 95% confidence interval of their mean difference "
    "contains 0. The difference is taken between runs of the same seed, and Student's t gives the "
    "interval. With fewer than two seeds in common nothing can be said, and the row shows “-”."
)

# The two-sided 95% quantiles of Student's t for 1, 2, ... pairs less one. The last also serves for
# more pairs, where it is a little too wide.
_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Difference:
    """What separates a method from the best one.

    Attributes:
        mean: The mean of the paired differences.
        half_width: Half the width of the 95% confidence interval of that mean.
        pairs: The number of seeds that both have.
    """

    mean: float
    half_width: float
    pairs: int

    @property
    def is_within_noise(self) -> bool:
        """Whether the interval contains 0."""
        return abs(self.mean) <= self.half_width


def paired_difference(losses: Mapping[int, float], best: Mapping[int, float]) -> Difference | None:
    """Return how far a method's losses are above the best ones; None without two common seeds.

    Args:
        losses: The loss of the method for each seed.
        best: The loss of the best method for each seed.
    """
    pairs = [losses[seed] - best[seed] for seed in sorted(losses.keys() & best.keys())]
    if len(pairs) < 2:
        return None
    quantile = _QUANTILES[min(len(pairs) - 1, len(_QUANTILES)) - 1]
    error = statistics.stdev(pairs) / math.sqrt(len(pairs))
    return Difference(statistics.fmean(pairs), quantile * error, len(pairs))
