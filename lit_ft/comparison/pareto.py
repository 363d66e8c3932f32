"""The Pareto front: the points that no other point beats."""

from __future__ import annotations

from collections.abc import Sequence

Point = tuple[float, float]


def dominates(one: Point, other: Point) -> bool:
    """Whether a point is nowhere higher than another one, and lower somewhere.

    >>> dominates((1, 2), (1, 3)), dominates((1, 3), (1, 3)), dominates((1, 4), (2, 3))
    (True, False, False)
    """
    return all(a <= b for a, b in zip(one, other, strict=True)) and one != other


def on_front(points: Sequence[Point | None]) -> list[bool]:
    """Return for each point whether no other one dominates it; False where there is no point.

    Args:
        points: What is to be low, such as a loss and a peak of memory; None where either is not
            known.
    """
    known = [point for point in points if point is not None]
    return [
        point is not None and not any(dominates(other, point) for other in known)
        for point in points
    ]
