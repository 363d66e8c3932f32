"""Find the learning rate of a method: try a few, and go on while the best one is at the edge."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

FACTOR = 2.0
"""The factor between two learning rates that are tried."""

MOST = 6
"""The largest number of learning rates that are tried."""


class NoRateHelpsError(Exception):
    """A run has failed for a reason that is the same at every learning rate."""


def best_rate(
    loss_at: Callable[[float], float | None], *, start: float, given: Sequence[float] = ()
) -> float | None:
    """Return the learning rate with the lowest loss; None if no run has a loss.

    It tries `start`, twice and half as much, and then goes on in the direction in which the loss
    falls, until the best rate has a worse one on either side.

    Args:
        loss_at: The function that trains with a learning rate and returns the loss; None if the run
            was pruned or has failed. It raises NoRateHelpsError to end the search.
        start: The learning rate to start from.
        given: The only rates to try, in place of those around `start`.
    """
    losses: dict[float, float] = {}

    def visit(rate: float) -> None:
        loss = loss_at(rate)
        losses[rate] = math.inf if loss is None else loss

    for rate in given or (start, start * FACTOR, start / FACTOR):
        try:
            visit(rate)
        except NoRateHelpsError:
            return None
    best = _lowest(losses)
    while not given and best is not None and len(losses) < MOST:
        beyond = [best * FACTOR] if best == max(losses) else []
        beyond += [best / FACTOR] if best == min(losses) else []
        if not beyond:
            break
        visit(beyond[0])
        best = _lowest(losses)
    return best


def _lowest(losses: dict[float, float]) -> float | None:
    best = min(losses, key=lambda rate: losses[rate])
    return best if losses[best] < math.inf else None
