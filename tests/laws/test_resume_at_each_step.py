"""Stopped at each step of two epochs, a run sees the rows and ends on the weights of one that ran.

However it says how long it is, on any schedule, on one rank and on two, from a table and a stream.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from tests.support.stops import LENGTHS, stops_that_differ, write_rows

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Checkpoint directory")]

STEPS = {"max_steps": 8, "max_epochs": 8, "both": 7}

# The linear schedule falls to zero just after the last step, so it must know which one that is.
CELLS = [*product(LENGTHS, ["cosine", "constant"]), ("max_epochs", "linear")]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.mark.parametrize(("length", "schedule"), CELLS)
def test_on_one_rank(path, tmp_path, length, schedule):
    found = stops_that_differ(tmp_path, path, schedule=schedule, length=length)
    assert found["differing"] == []
    assert found["stops"] == list(range(1, STEPS[length]))


@pytest.mark.parametrize(("length", "schedule"), CELLS)
def test_on_two_ranks(on_both, path, tmp_path, length, schedule):
    first, second = on_both(stops_that_differ, tmp_path, path, schedule=schedule, length=length)
    for rank in (first, second):
        assert rank["differing"] == []
        assert rank["stops"] == list(range(1, STEPS[length]))
    assert first["rows"] != second["rows"]
    assert first["sum"] == second["sum"]


@pytest.mark.parametrize(
    ("streaming", "by"), [(True, "signal"), (True, "callback"), (False, "callback")]
)
def test_in_a_stream_and_ended_by_a_callback(path, tmp_path, streaming, by):
    """A stream says its length by max_steps, as it must."""
    options = {"schedule": "cosine", "length": "max_steps", "streaming": streaming, "by": by}
    found = stops_that_differ(tmp_path, path, **options)
    assert found["differing"] == []
    assert found["stops"] == list(range(1, 8))
