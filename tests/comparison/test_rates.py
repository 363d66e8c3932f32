"""The search for a learning rate: where it looks, and when it stops."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from lit_ft.comparison.rates import FACTOR, MOST, NoRateHelpsError, best_rate


@given(st.floats(-3, 3), st.floats(1e-6, 1e-2))
def test_it_finds_the_lowest_point_of_a_valley(away: float, start: float) -> None:
    lowest, visited = start * FACTOR**away, []

    def loss_at(rate: float) -> float:
        visited.append(rate)
        return abs(math.log(rate / lowest))

    best = best_rate(loss_at, start=start)
    assert best in visited and len(set(visited)) == len(visited) <= MOST
    assert abs(math.log(best / lowest, FACTOR)) <= 0.5 + 1e-9  # none of the grid is closer
    if len(visited) < MOST:
        assert min(visited) < best < max(visited)


def test_a_rate_that_fails_is_not_the_best_and_stops_the_search_on_its_side() -> None:
    def loss_at(rate: float) -> float | None:
        return None if rate > 1 else 1 / rate

    visited = []
    assert best_rate(lambda rate: visited.append(rate) or loss_at(rate), start=1) == 1
    assert visited == [1, 2, 0.5]


def test_only_the_given_rates_are_tried() -> None:
    visited = []
    assert best_rate(lambda rate: visited.append(rate) or -rate, start=1, given=[3, 4]) == 4
    assert visited == [3, 4]


def test_there_is_no_best_rate_if_all_fail() -> None:
    assert best_rate(lambda rate: None, start=1) is None


def test_a_failure_at_every_rate_ends_the_search() -> None:
    visited = []

    def loss_at(rate: float) -> float:
        visited.append(rate)
        raise NoRateHelpsError

    assert best_rate(loss_at, start=1) is None and visited == [1]
