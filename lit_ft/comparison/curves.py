"""The loss curves of a method: the mean over its runs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

Point = Mapping[str, float]


def mean_curve(curves: Sequence[Sequence[Point]], loss: str, x: str) -> list[tuple[float, float]]:
    """Return x and loss of each step that all curves have, on average over the curves.

    Args:
        curves: The points of each run, in the order of their steps.
        loss: The name of the loss in the points.
        x: The name of what the loss is drawn over; a point without it is left out.
    """
    by_step = [{one["step"]: one for one in curve if x in one} for curve in curves]
    if not by_step:
        return []
    common = set.intersection(*map(set, by_step))
    return [
        (
            statistics.fmean(points[step][x] for points in by_step),
            statistics.fmean(points[step][loss] for points in by_step),
        )
        for step in sorted(common)
    ]
