"""A number in bfloat16 is one of its two neighbours, and the right one on average."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_ft.tensors.stochastic_rounding import (
    random_bits,
    round_moved,
    round_stochastically,
    round_with,
)
from tests.support.seeded import seeded


def test_every_bfloat16_value_stays_what_it_is() -> None:
    patterns = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    values = patterns.view(torch.bfloat16)
    rounded = round_stochastically(values.float(), generator=seeded(0))
    same = rounded.view(torch.int16) == patterns
    assert (same | (rounded.isnan() & values.isnan())).all()


@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(0, 2**63))
def test_the_result_is_a_neighbour(value: float, seed: int) -> None:
    x = torch.full((64,), value)
    rounded = round_stochastically(x, generator=seeded(seed)).float()
    cut_off = (x.view(torch.int32) & -(1 << 16)).view(torch.float32)
    away = (cut_off.view(torch.int32) + (1 << 16)).view(torch.float32)
    assert ((rounded == cut_off) | (rounded == away)).all()
    assert rounded.isfinite().all()


@pytest.mark.parametrize("x", [1.001, -1.0071, 3e-5, -2.5e-39, 1e30, 0.3333])
def test_the_mean_of_many_draws_is_the_value(x: float) -> None:
    draws = 1 << 18
    value = torch.full((draws,), x)
    rounded = round_stochastically(value, generator=seeded(0)).double()
    low, high = rounded.min(), rounded.max()
    share = (value[0].double() - low) / (high - low)
    sigma = (high - low) * (share * (1 - share) / draws).sqrt()
    assert high > low
    assert (rounded.mean() - value[0].double()).abs() < 4 * sigma


@given(st.floats(-4, 4, width=32), st.floats(0, 1), st.integers(0, 2**31))
def test_a_moved_weight_is_rounded_as_the_sum(step: float, keep: float, seed: int) -> None:
    weight = torch.randn(64, 3, generator=seeded(seed)).bfloat16()
    steps = torch.full((64, 3), step)
    bits = random_bits(weight.shape, weight.device, generator=seeded(seed))
    expected = round_with(weight.float() * torch.tensor(keep) + steps, bits)
    moved = round_moved(weight, steps, bits, keep=keep)
    torch.testing.assert_close(moved, expected, rtol=0, atol=0)


def test_values_beyond_the_largest_bfloat16_do_not_become_infinite() -> None:
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([largest, -largest, torch.inf, -torch.inf, torch.nan]).repeat(100, 1)
    rounded = round_stochastically(x, generator=seeded(0)).float()
    limit = torch.finfo(torch.bfloat16).max
    expected = torch.tensor([limit, -limit, torch.inf, -torch.inf, torch.nan]).repeat(100, 1)
    torch.testing.assert_close(rounded, expected, rtol=0, atol=0, equal_nan=True)
