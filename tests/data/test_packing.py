import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_ft.data.packing import pack

# A busy machine is no failure of a law.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

lengths_and_max = st.integers(1, 40).flatmap(
    lambda m: st.tuples(st.lists(st.integers(0, m), max_size=60), st.just(m))
)


@given(lengths_and_max)
def test_every_example_is_packed_once_and_no_bin_overflows(case):
    lengths, max_length = case
    bins = pack(lengths, max_length)
    assert sorted(i for indices in bins for i in indices) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in indices) <= max_length for indices in bins)
    assert all(bins)


@given(lengths_and_max)
def test_no_two_bins_would_fit_into_one(case):
    lengths, max_length = case
    fills = sorted(sum(lengths[i] for i in indices) for indices in pack(lengths, max_length))
    assert len(fills) < 2 or fills[0] + fills[1] > max_length


@given(lengths_and_max)
def test_bins_keep_the_order_of_the_data(case):
    bins = pack(*case)
    assert all(indices == sorted(indices) for indices in bins)
    assert bins == sorted(bins)


def test_longest_first_finds_the_perfect_packing():
    assert pack([4, 4, 6, 6], 10) == [[0, 3], [1, 2]]


def test_the_fullest_bin_with_space_is_taken():
    # Were 3 put behind 6, the second 2 would open a third bin.
    assert pack([7, 6, 3, 2, 2], 10) == [[0, 2], [1, 3, 4]]


def test_text_like_lengths_leave_almost_no_padding():
    lengths = np.random.default_rng(0).lognormal(5.5, 1, 5_000).astype(int).clip(1, 2048)
    bins = pack(lengths.tolist(), 2048)
    assert len(bins) <= math.ceil(lengths.sum() / 2048) * 1.005


def test_time_is_not_quadratic():
    lengths = np.random.default_rng(0).integers(1, 4096, 200_000).tolist()
    started = time.process_time()
    pack(lengths, 4096)
    assert time.process_time() - started < 5  # 0.3 s; quadratic: minutes


def test_too_long_example_is_named():
    with pytest.raises(ValueError, match="Example 1 has 9 tokens.*max_length=8.*truncate"):
        pack([8, 9], 8)


def test_nothing_packs_into_nothing():
    assert pack([], 8) == []
