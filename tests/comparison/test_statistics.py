"""The statistics of a comparison: means, the rule of noise, the front, the places of labels."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_ft.comparison.curves import mean_curve
from lit_ft.comparison.label_places import label_places
from lit_ft.comparison.noise import paired_difference
from lit_ft.comparison.pareto import dominates, on_front
from lit_ft.comparison.spread import spread

FIGURES = st.floats(0, 10, allow_nan=False)
POINTS = st.lists(st.tuples(FIGURES, FIGURES), min_size=1, max_size=12)


def test_a_spread_is_the_sample_deviation_of_what_is_known():
    found = spread([2.0, None, 4.0, 6.0])
    assert (found.mean, found.deviation) == (4.0, 2.0)
    assert spread([1.5]).deviation is None
    assert spread([None]) is None


def test_a_difference_needs_two_common_seeds():
    assert paired_difference({0: 1.0, 1: 2.0}, {1: 1.0, 2: 1.0}) is None
    assert paired_difference({0: 1.0, 1: 2.0}, {0: 1.0, 1: 1.5}).pairs == 2


def test_what_all_seeds_share_is_no_noise():
    """The losses of seeds differ by 0.5, but each by 0.01 from the best one's."""
    best = {0: 2.0, 1: 2.5, 2: 3.0}
    found = paired_difference({seed: loss + 0.01 for seed, loss in best.items()}, best)
    assert found.mean == pytest.approx(0.01) and not found.is_within_noise
    assert paired_difference({0: 2.1, 1: 2.4, 2: 3.0}, best).is_within_noise


def test_the_interval_is_that_of_students_t():
    """Of the differences 1, 2, 3: 2 ± 4.303 x 1 / sqrt(3)."""
    found = paired_difference({0: 1.0, 1: 2.0, 2: 3.0}, dict.fromkeys(range(3), 0.0))
    assert found.half_width == pytest.approx(4.303 / math.sqrt(3))
    assert found.is_within_noise  # it is 2.48


@given(POINTS)
def test_the_front_is_what_no_point_dominates(points):
    front = on_front(points)
    assert any(front)
    for point, is_on in zip(points, front, strict=True):
        assert is_on != any(dominates(other, point) for other in points)


@given(POINTS, st.integers(0, 11), FIGURES, FIGURES)
def test_a_dominated_point_changes_nothing_of_the_front(points, index, right, up):
    x, y = points[index % len(points)]
    worse = (x + right + 1, y + up)
    assert on_front([*points, worse]) == [*on_front(points), False]


@given(POINTS)
def test_a_point_that_is_not_known_is_on_no_front(points):
    assert on_front([*points, None]) == [*on_front(points), False]


@given(st.lists(st.tuples(st.floats(0, 370), st.floats(0, 240)), max_size=14))
def test_no_label_covers_a_point_or_another_label(points):
    widths = [7.5 * len(str(number)) for number in range(len(points))]
    places = label_places(points, widths, size=(370, 240), height=15, radius=5)
    boxes = [
        (x - width / 2, y - 7.5, x + width / 2, y + 7.5)
        for (x, y), width in ((p, w) for p, w in zip(places, widths, strict=True) if p)
    ]
    assert all(a >= 0 and b >= 0 and c <= 370 and d <= 240 for a, b, c, d in boxes)
    others = [(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    for number, one in enumerate(boxes):
        for other in [*boxes[:number], *others]:
            apart = one[2] <= other[0] or other[2] <= one[0]
            assert apart or one[3] <= other[1] or other[3] <= one[1]


def test_a_curve_is_the_mean_over_the_steps_that_all_runs_have():
    first = [{"step": n, "tokens": 10 * n, "val_loss": 4.0 - n} for n in (0, 1, 2)]
    second = [{"step": n, "tokens": 20 * n, "val_loss": 2.0 - n} for n in (0, 2, 3)]
    assert mean_curve([first, second], "val_loss", "tokens") == [(0, 3.0), (30, 1.0)]
    assert mean_curve([], "val_loss", "tokens") == []
    assert mean_curve([first, []], "val_loss", "tokens") == []
