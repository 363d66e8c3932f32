"""The mean of a measurement, and its spread over runs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """The mean of one or more values.

    Attributes:
        mean: The mean.
        deviation: The sample standard deviation; None for a single value.
    """

    mean: float
    deviation: float | None = None


def spread(values: Iterable[float | None]) -> Spread | None:
    """Return the mean and the spread of the values that are there; None if there are none.

    >>> spread([1.0, None, 3.0]).mean, spread([2.5]).deviation, spread([None])
    (2.0, None, None)
    """
    found = sorted(value for value in values if value is not None)  # in any order the same sum
    if not found:
        return None
    deviation = statistics.stdev(found) if len(found) > 1 else None
    return Spread(statistics.fmean(found), deviation)
