"""The course of a run in summary.json: bounded, in order, and the same over a resume."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lit_ft.run.history import MOST, History, thinned
from tests.support.running import SHORT, run_job

STEPS = st.lists(st.integers(0, 10**6), unique=True, max_size=60).map(sorted)


@given(STEPS, st.integers(2, 20))
def test_a_curve_is_bounded_and_keeps_its_ends_and_its_order(steps, most):
    kept = [one["step"] for one in thinned([{"step": step} for step in steps], most)]
    assert len(kept) == min(len(steps), most)
    assert kept == sorted(set(kept)) and set(kept) <= set(steps)
    assert kept[:1] == steps[:1] and kept[-1:] == steps[-1:]


def test_a_long_run_is_drawn_over_all_of_its_steps():
    history = History()
    for step in range(1, 5001):
        history.note("train", 1.0, step=step, tokens=step, seconds=1.0)
    steps = [one["step"] for one in history.curves["train"]]
    assert len(steps) == MOST
    gaps = [after - before for before, after in zip(steps, steps[1:], strict=False)]
    assert max(gaps) < 3 * 5000 / MOST


def test_a_resumed_history_goes_on_from_its_checkpoint():
    first = History()
    first.note("train", 3.0, step=5, tokens=50, seconds=1.0)
    saved = first.state_dict(tokens=60, seconds=1.5)
    first.note("train", 2.0, step=10, tokens=100, seconds=2.0)  # lost, as the run was killed
    resumed = History()
    resumed.load_state_dict(saved)
    resumed.note("train", 2.5, step=8, tokens=20, seconds=0.5)
    assert resumed.curves["train"] == [
        {"step": 5, "tokens": 50, "seconds": 1.0, "train_loss": 3.0},
        {"step": 8, "tokens": 80, "seconds": 2.0, "train_loss": 2.5},
    ]


def test_a_run_and_its_resume_leave_one_history(tmp_path):
    settings = [*SHORT, "model=tiny", "logger=none", "~callbacks.samples", "~callbacks.export"]
    settings = [one for one in settings if "samples.max" not in one]
    first = run_job(tmp_path / "run", *settings, "trainer.max_steps=4")
    second = run_job(tmp_path / "run", *settings, "trainer.max_steps=7", "resume=auto")
    train, val = (second["history"][name] for name in ("train", "val"))
    assert train[:4] == first["history"]["train"]
    assert [one["step"] for one in train] == [1, 2, 3, 4, 5, 6, 7]
    assert [one["step"] for one in val] == [0, 4, 7]
    assert train[3]["tokens"] == first["tokens"]
    assert train[-1]["tokens"] == val[-1]["tokens"] == first["tokens"] + second["tokens"]
    assert train[-1]["train_loss"] == second["train_loss"]
    assert (val[0]["val_loss"], val[0]["tokens"]) == (second["initial_val_loss"], 0)
    assert val[-1]["val_loss"] == second["val_loss"]
    for curve in (train, val):
        seconds = [one["seconds"] for one in curve]
        assert seconds == sorted(seconds)
