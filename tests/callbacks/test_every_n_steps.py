"""When a multiple of n optimizer steps is reached, and that it is said once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lit_ft.callbacks._support.every_n_steps import EveryNSteps


def trainer_at(step: int, log_every_n_steps: int = 50) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, log_every_n_steps=log_every_n_steps)


@given(st.integers(1, 7), st.integers(0, 20), st.integers(1, 5), st.integers(1, 30))
def test_due_once_for_each_multiple_after_the_start(every, start, batches, steps):
    every_n = EveryNSteps(every)
    every_n.start(trainer_at(start))
    due = []
    for step in range(start, start + steps + 1):
        # The first batches of a step still see the number of the step before.
        due += [step for _ in range(batches) if every_n.due(trainer_at(step))]
    assert due == [step for step in range(start + 1, start + steps + 1) if step % every == 0]


def test_a_multiple_that_two_optimizers_step_over_counts():
    every_n = EveryNSteps(3)
    every_n.start(trainer_at(0))
    assert [step for step in (2, 4, 6, 8, 10) if every_n.due(trainer_at(step))] == [4, 6, 10]


@pytest.mark.parametrize(("log_every", "due"), [(4, [4, 8]), (0, [])])
def test_none_follows_the_trainer_whose_zero_is_never(log_every, due):
    every_n = EveryNSteps(None)
    every_n.start(trainer_at(0))
    assert [step for step in range(9) if every_n.due(trainer_at(step, log_every))] == due


@pytest.mark.parametrize("every", [0, -1])
def test_less_than_one_step_is_refused(every):
    with pytest.raises(MisconfigurationException, match=f"every_n_steps={every}"):
        EveryNSteps(every)
