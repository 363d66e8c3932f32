"""When bases move: the turns of layers, alone and in real steps."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_ft.callbacks import GaLore
from lit_ft.subspace import Refresh
from lit_ft.subspace.projectors import SVD, Oja, Random, SubspaceIteration
from lit_ft.subspace.schedule import RefreshSchedule
from tests.support.subspace_run import Run, batches


@given(
    every=st.integers(1, 12),
    count=st.integers(1, 9),
    stagger=st.booleans(),
    at_once=st.booleans(),
    start=st.integers(0, 30),
)
def test_turns_come_every_so_many_steps_each_layer_at_its_offset(
    every, count, stagger, at_once, start
):
    names = [str(index) for index in range(count)]
    turns = RefreshSchedule(
        names, Refresh(stagger=stagger), every=every, at_once=at_once, step=start
    )
    for step in range(start, start + 40):
        for index, name in enumerate(names):
            offset = index * every // count if stagger else 0
            if at_once:
                due = step == 0 or (step > offset and (step - offset) % every == 0)
            else:
                due = (step + 1 - offset) % every == 0
            assert turns.is_due(name, step) == due
        turns.advance(step, dict.fromkeys(names, 1.0))


def turns_taken(turns, overlaps, steps):
    """The steps at which the one layer moves; `overlaps` are those of its moves, in turn."""
    taken, overlaps = [], iter(overlaps)
    for step in range(steps):
        seen = {}
        if turns.is_due("layer", step):
            taken.append(step)
            seen = {"layer": next(overlaps)}
        turns.advance(step, seen)
    return taken


def test_a_layer_that_rests_waits_twice_as_long_up_to_the_longest_and_moves_on_at_once():
    refresh = Refresh(every=10, adaptive=True, threshold=0.5, longest=4)
    rests, moves = 0.5, 0.49
    taken = turns_taken(
        RefreshSchedule(["layer"], refresh, every=1),
        [rests] * 4 + [moves, rests, math.nan, rests, rests],
        230,
    )
    assert [b - a for a, b in zip(taken, taken[1:], strict=False)] == [
        *(20, 40, 40, 40),  # it rests
        *(10, 20, 10, 20),  # it moves, rests, lost its rank, rests
    ]
    still = RefreshSchedule(["layer"], Refresh(every=10), every=1)
    assert turns_taken(still, [rests] * 9, 90) == list(range(9, 90, 10))


@given(longest=st.integers(1, 9), every=st.integers(1, 5), rests=st.lists(st.booleans()))
def test_an_interval_lies_between_the_base_and_the_longest(longest, every, rests):
    turns = RefreshSchedule(["layer"], Refresh(adaptive=True, longest=longest), every=every)
    for rest in rests:
        before = turns.interval["layer"]
        turns.advance(turns.next["layer"], {"layer": float(rest)})
        assert turns.interval["layer"] == (min(2 * before, longest * every) if rest else every)


def test_another_schedules_turns_are_not_continued():
    ours, theirs = (
        RefreshSchedule(["a", "b"], Refresh(adaptive=adaptive), every=4)
        for adaptive in (True, False)
    )
    for turns in (ours, theirs):
        for step in range(9):
            turns.advance(step, {"a": 1.0, "b": 1.0})
    fresh = RefreshSchedule(["a", "b"], Refresh(), every=4)
    fresh.load_state_dict(ours.state_dict(), step=9)
    assert (fresh.next, fresh.interval) == (theirs.next, theirs.interval)
    again = RefreshSchedule(["a", "b"], Refresh(adaptive=True), every=4)
    again.load_state_dict(ours.state_dict(), step=9)
    assert (again.next, again.interval) == (ours.next, ours.interval)
    assert again.interval != fresh.interval


@pytest.mark.parametrize(
    "wrong", [{"every": 0}, {"every": 2.5}, {"threshold": 0.0}, {"threshold": 1.5}, {"longest": 0}]
)
def test_a_refresh_out_of_its_range_is_refused_by_name(wrong):
    [(name, value)] = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        Refresh(**wrong)


@pytest.mark.parametrize("every", [0, -4, 2.5, None])
def test_a_projectors_interval_out_of_its_range_is_refused_by_name(every):
    for refused in (GaLore, Run):
        with pytest.raises(ValueError, match=f"every={every}: give a whole number"):
            refused(projector=Oja(every=every))


def moves_of(projector, refresh, steps):
    """At which steps which layers' bases move."""
    run = Run(projector, refresh=refresh)
    moved = []
    for data in batches(steps):
        before = {n: la.basis.detach().clone() for n, la in run.steps.layers.items()}
        run.step(*data)
        moved.append(
            {n for n, la in run.steps.layers.items() if not torch.equal(before[n], la.basis)}
        )
    return moved, list(run.steps.layers)


@pytest.mark.parametrize("projector", [SVD(every=4), SubspaceIteration(every=4), Random(every=4)])
def test_bases_move_when_it_is_their_turn_and_at_no_other_step(projector):
    moved, names = moves_of(projector, Refresh(), 12)
    for step, found in enumerate(moved):
        expected = set()
        for index, name in enumerate(names):
            offset = index * 4 // len(names)
            if isinstance(projector, SVD):
                due = step == 0 or (step > offset and (step - offset) % 4 == 0)
            else:
                due = (step + 1 - offset) % 4 == 0
            if due or (step < 3 and isinstance(projector, SubspaceIteration)):
                expected.add(name)
        assert found == expected, step


def test_the_interval_of_the_refresh_stands_above_the_projectors():
    moved, _ = moves_of(SubspaceIteration(every=1), Refresh(every=5, stagger=False), 11)
    assert [step for step, names in enumerate(moved) if names] == [0, 1, 2, 4, 9]


@pytest.mark.parametrize(
    ("threshold", "expected"), [(0.01, [5, 11, 23, 35]), (1.0, list(range(5, 36, 3)))]
)
def test_an_adaptive_run_moves_less_often_where_bases_rest(threshold, expected):
    refresh = Refresh(every=3, stagger=False, adaptive=True, threshold=threshold, longest=4)
    moved, _ = moves_of(SubspaceIteration(), refresh, 36)
    # Rounds 0 to 2 take the random start to the data: they do not count as turns.
    assert [step for step, names in enumerate(moved) if names] == [0, 1, 2, *expected]
