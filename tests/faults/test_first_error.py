"""Of several ranks one fails and the others follow: the error of the first is the run's."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_ft.run.summary import RunSummary, read_summary
from lit_ft.storage.json_file import read_json, write_json

PEER_IS_GONE = RuntimeError("[../gloo/pair.cc:534] Connection closed by peer [127.0.0.1]:1")
OF_RANK_1 = ValueError("of rank 1")


@pytest.fixture
def rank(monkeypatch, tmp_path):
    """Gives the summary of a rank, as it has it in its process; the first one has started."""

    def of(number):
        monkeypatch.setattr(rank_zero_only, "rank", number)
        return RunSummary(tmp_path, {})

    return of


def fail(summary, error):
    with suppress(BaseException):
        summary.__exit__(type(error), error, None)


def told(folder):
    found = read_json(folder / "summary.json")
    return found["status"], found["error"]["message"], found["error"].get("rank", 0)


def test_the_error_of_another_rank_is_there_before_the_first_one_notices(rank, tmp_path):
    """It waits for the other, and its launcher kills it."""
    rank(0).__enter__()
    fail(rank(1), OF_RANK_1)
    assert told(tmp_path) == ("failed", "of rank 1", 1)
    assert (
        read_summary(tmp_path)["ended"] == "ValueError before the first step: of rank 1 (on rank 1)"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


@pytest.mark.parametrize("left", [{"error": "a text"}, {"error": {"rank": 1}}, {}])
@pytest.mark.parametrize("number", [0, 1])
def test_a_summary_of_another_program_hides_no_error(rank, tmp_path, left, number):
    summary = rank(number)
    write_json(tmp_path / "summary.json", left)
    if number == 0:
        summary.write()  # as when training starts
    summary.__exit__(ValueError, OF_RANK_1, None)
    kept = number == 1 and "error" in left
    assert kept or told(tmp_path) == ("failed", "of rank 1", number)


@pytest.mark.parametrize("error", [SIGTERMException(), PEER_IS_GONE, None])
def test_the_first_rank_keeps_the_error_that_it_follows(rank, tmp_path, error):
    first = rank(0).__enter__()
    fail(rank(1), torch.OutOfMemoryError("of rank 1"))
    rank(0)
    first.write()  # as when training starts
    fail(first, error)
    assert told(tmp_path) == ("out_of_memory", "of rank 1", 1)


def test_an_error_of_its_own_is_the_first_ranks(rank, tmp_path):
    first = rank(0).__enter__()
    fail(rank(1), OF_RANK_1)
    rank(0)
    fail(first, ValueError("of rank 0"))
    assert told(tmp_path) == ("failed", "of rank 0", 0)
    fail(rank(1), ValueError("later"))
    assert told(tmp_path) == ("failed", "of rank 0", 0)


def test_a_rank_that_follows_writes_nothing_and_a_new_run_begins_without_errors(rank, tmp_path):
    rank(0).__enter__()
    for error in (PEER_IS_GONE, SIGTERMException()):
        fail(rank(1), error)
    assert read_summary(tmp_path)["error"] is None
    fail(rank(1), OF_RANK_1)
    rank(0).__enter__()
    assert (read_summary(tmp_path)["status"], read_summary(tmp_path)["error"]) == (
        "interrupted",
        None,
    )
