"""The rates that each step runs at."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import SGD
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from lit_ft.optim import WarmupSchedule
from lit_ft.optim.schedules import LENGTH_UNKNOWN, obey_options, options_of

COSINE = partial(get_cosine_with_min_lr_schedule_with_warmup, min_lr_rate=0.1)
SCHEDULES = [COSINE, get_linear_schedule_with_warmup, get_constant_schedule_with_warmup]
PEAKS = (2.0, 0.5)


def optimizer() -> SGD:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": peak} for peak in PEAKS]
    return SGD(groups, lr=1.0)


def advance(opt: SGD, scheduler: Any, steps: int) -> list[float]:
    """Return the first group's rate at each of the next `steps`."""
    rates = []
    for _ in range(steps):
        rates.append(opt.param_groups[0]["lr"])
        opt.step()
        scheduler.step()
    return rates


def rates(schedule: Any, warmup: float, steps: int) -> list[float]:
    opt = optimizer()
    return advance(opt, WarmupSchedule(schedule, warmup)(opt, steps), steps)


@given(schedule=st.sampled_from(SCHEDULES), steps=st.integers(2, 60), share=st.floats(0, 1))
def test_the_ramp_starts_above_zero_and_then_is_that_of_transformers(
    schedule: Any, steps: int, share: float
) -> None:
    warmup = int(share * (steps - 1))
    ours = rates(schedule, 0 if warmup == 0 else warmup, steps)
    opt = optimizer()
    lengths = {"num_warmup_steps": warmup}
    if schedule is not get_constant_schedule_with_warmup:
        lengths["num_training_steps"] = steps
    theirs = advance(opt, schedule(opt, **lengths), steps)
    assert ours[warmup:] == pytest.approx(theirs[warmup:], rel=1e-12)
    assert ours[warmup] == PEAKS[0]
    assert ours[:warmup] == pytest.approx(
        [PEAKS[0] * (step + 1) / (warmup + 1) for step in range(warmup)]
    )
    assert all(rate > 0 for rate in ours)


def test_every_group_follows_its_own_peak() -> None:
    opt = optimizer()
    scheduler = WarmupSchedule(COSINE, 0.2)(opt, 10)
    for _ in range(10):
        first, second = (group["lr"] for group in opt.param_groups)
        assert first / second == pytest.approx(PEAKS[0] / PEAKS[1])
        opt.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("warmup", "steps", "expected"),
    [
        (0, 100, 0),
        (0.05, 100, 5),
        (0.05, 10, 1),
        (0.05, 1, 0),
        (0.999, 1000, 999),
        (1, 100, 1),
        (30.0, 100, 30),
    ],
)
def test_warmup_is_a_fraction_below_one_and_steps_from_one_on(
    warmup: float, steps: int, expected: int
) -> None:
    assert WarmupSchedule(COSINE, warmup).num_warmup_steps(steps) == expected


@pytest.mark.parametrize("warmup", [-0.1, -5, 1.5, float("nan"), float("inf")])
def test_a_warmup_that_means_nothing_is_refused(warmup: float) -> None:
    with pytest.raises(ValueError, match=r"warmup=.* give a fraction"):
        WarmupSchedule(COSINE, warmup)


@pytest.mark.parametrize(
    ("warmup", "steps", "message"),
    [
        (10, 10, "does not end within 10 steps"),
        (0.5, -1, r"Set Trainer\(max_steps="),
        (0.5, float("inf"), r"Set Trainer\(max_steps="),
    ],
)
def test_a_run_that_the_schedule_does_not_fit_is_refused(
    warmup: float, steps: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        WarmupSchedule(COSINE, warmup)(optimizer(), steps)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("length", [12, 40])
def test_a_resumed_run_follows_the_curve_of_its_own_length(schedule: Any, length: int) -> None:
    stopped = optimizer()
    scheduler = WarmupSchedule(schedule, 3)(stopped, 12)
    advance(stopped, scheduler, 12)
    resumed = optimizer()
    resumed_scheduler = WarmupSchedule(schedule, 3)(resumed, length)
    # Lightning's order: the optimizer with the old rate, then the scheduler.
    resumed.load_state_dict(stopped.state_dict())
    resumed_scheduler.load_state_dict(scheduler.state_dict())
    rest = advance(resumed, resumed_scheduler, 28)
    uninterrupted = optimizer()
    whole = advance(uninterrupted, WarmupSchedule(schedule, 3)(uninterrupted, length), 40)
    assert rest == whole[12:]


def test_no_warning_about_the_order_of_steps() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rates(COSINE, 0.1, 5)


def test_state_is_plain_enough_for_a_safe_load(tmp_path: Any) -> None:
    opt = optimizer()
    scheduler = WarmupSchedule(COSINE, 0.1)(opt, 5)
    torch.save(scheduler.state_dict(), tmp_path / "schedule.pt")
    state = torch.load(tmp_path / "schedule.pt", weights_only=True)
    assert state["base_lrs"] == list(PEAKS)
    assert state["_last_lr"] == scheduler.get_last_lr()


def test_a_rate_that_is_a_tensor_resumes_as_it_was() -> None:
    def built(length: int) -> Any:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=torch.tensor(0.5))
        options = options_of(optimizer)
        return (
            optimizer,
            options,
            WarmupSchedule(get_constant_schedule_with_warmup, 3)(optimizer, length),
        )

    first, _, ran = built(10)
    for _ in range(5):
        first.step()
        ran.step()
    second, options, resumed = built(LENGTH_UNKNOWN)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(ran.state_dict())
    assert obey_options(second, options) == []
    assert float(second.param_groups[0]["lr"]) == 0.5


def test_a_rate_that_only_reports_is_no_option() -> None:
    from lit_ft.optim.adafactor import RelativeStepAdafactor

    optimizer = RelativeStepAdafactor([torch.nn.Parameter(torch.ones(2))])
    assert "lr" not in options_of(optimizer)[0]
    assert "weight_decay" in options_of(optimizer)[0]
