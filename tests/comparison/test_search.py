"""A search draws, prunes, keeps its study, and goes on where it was stopped."""

from __future__ import annotations

import math
from typing import Any

import pytest
from optuna.trial import TrialState

from lit_ft.comparison import trainable as trainable_room
from lit_ft.comparison.search import Search
from lit_ft.comparison.space import space_of
from lit_ft.comparison.verb import alone_in
from lit_ft.comparison.workers import Workers
from lit_ft.run.trial import callbacks_of_trial
from lit_ft.storage.json_file import write_json

SMALL = ["model=tiny", "data.max_length=32", "trainer.max_steps=8", "optim=sgd"]
RATE = "optim.lr=tag(log,interval(1e-3,10))"


class Killed(Exception):
    pass


class Trainer:
    """Stands in for train.py: the loss is lowest at a rate of 0.1, and not finite above 5."""

    def __init__(self, monkeypatch, *, lives: float = math.inf) -> None:
        self.monkeypatch = monkeypatch
        self.lives = lives
        self.trained: list[float] = []

    def __call__(self, cell: Any, environment: Any, stopped: Any) -> dict[str, Any]:
        if self.lives <= 0:
            raise Killed
        self.lives -= 1
        [rate] = [float(a.split("=")[1]) for a in cell.arguments if a.startswith("optim.lr=")]
        self.trained.append(rate)
        for name, value in environment.items():
            self.monkeypatch.setenv(name, value)
        trials = callbacks_of_trial()
        self.monkeypatch.delenv("LIT_FT_TRIAL", raising=False)
        away = abs(math.log(rate / 0.1))
        losses, status = [], "failed" if rate > 5 else "completed"
        for number in range(1, 5) if rate <= 5 else ():
            losses.append(3 + away - 0.1 * number)
            for one in trials:
                one.trial.report(losses[-1], number)
                if number < 4 and one.trial.should_prune():
                    status = "pruned"
            if status == "pruned":
                break
        summary = {
            "status": status,
            "ended": status,
            "steps": max(1, 2 * len(losses)),
            "config": {},
            "val_loss": losses[-1] if status == "completed" else None,
            "history": {"val": [{"step": 2 * n, "val_loss": x} for n, x in enumerate(losses, 1)]},
        }
        cell.folder.mkdir(parents=True, exist_ok=True)
        write_json(cell.folder / "summary.json", summary)
        return summary


def searched(folder, trainer, trials, *arguments, jobs=1):
    folder.mkdir(exist_ok=True)
    search = Search(space_of([*SMALL, *(arguments or [RATE])]), folder, seed=0)
    search.run(trials, Workers(trainer, [{}] * jobs))
    return search


def test_it_finds_the_best_rate_and_ends_bad_ones_early(tmp_path, monkeypatch):
    trainer = Trainer(monkeypatch)
    search = searched(tmp_path, trainer, 24)
    assert len(trainer.trained) == 24
    best = search.best()
    assert best is not None and 0.05 < best.params["optim.lr"] < 0.2
    states = [one.state for one in search.study.get_trials()]
    assert states.count(TrialState.PRUNED) > 5
    [failed] = {r > 5 for r, s in zip(trainer.trained, states, strict=True) if s == TrialState.FAIL}
    assert failed
    assert all(s == TrialState.FAIL for r, s in zip(trainer.trained, states, strict=True) if r > 5)


def test_the_values_that_bad_trials_reached_are_in_the_study(tmp_path, monkeypatch):
    search = searched(tmp_path, Trainer(monkeypatch), 8)
    for trial in search.study.get_trials():
        steps = list(trial.intermediate_values)
        assert steps == list(range(1, len(steps) + 1))
        assert bool(steps) == (trial.params["optim.lr"] <= 5)


@pytest.mark.parametrize("lives", [1, 5])
def test_one_that_was_killed_trains_the_cut_trial_again_and_goes_on(tmp_path, monkeypatch, lives):
    with pytest.raises(Killed):
        searched(tmp_path, Trainer(monkeypatch, lives=lives), 8)
    [cut] = [one for one in _study(tmp_path) if one.state == TrialState.RUNNING]
    resumed = Trainer(monkeypatch)
    search = searched(tmp_path, resumed, 8)
    assert len(resumed.trained) == 8 - lives
    assert resumed.trained[0] == pytest.approx(cut.params["optim.lr"], rel=1e-3)
    assert len(set(resumed.trained)) == len(resumed.trained)  # no sequence starts over
    again = Trainer(monkeypatch, lives=0)
    assert searched(tmp_path, again, 8).best() == search.best()
    assert len(searched(tmp_path, Trainer(monkeypatch), 10).study.get_trials()) >= 10


def test_a_combination_that_is_drawn_again_trains_once(tmp_path):
    trained = []

    def train(cell, environment, stopped):
        trained.append(cell.folder)
        summary = {"status": "completed", "config": {}, "steps": 1, "ended": "", "val_loss": 1.0}
        cell.folder.mkdir(parents=True)
        write_json(cell.folder / "summary.json", summary)
        return summary

    search = searched(tmp_path, train, 9, "seed=1,2", jobs=3)
    assert len(trained) == 2 and len(search.study.get_trials()) == 9


def test_a_new_setting_keeps_its_plus(tmp_path):
    def train(cell, environment, stopped):
        assert any(one.startswith("+trainer.limit_train_batches=") for one in cell.arguments)
        return {"status": "completed", "steps": 1, "ended": "", "val_loss": 1.0}

    searched(tmp_path, train, 1, "+trainer.limit_train_batches=10,20")


def test_a_damaged_summary_is_a_trial_to_train(tmp_path, monkeypatch):
    searched(tmp_path, Trainer(monkeypatch), 2)
    next(tmp_path.glob("*/summary.json")).write_text("{")
    trainer = Trainer(monkeypatch)
    searched(tmp_path, trainer, 2)
    assert len(trainer.trained) == 1


def test_another_default_is_another_search(tmp_path, monkeypatch):
    searched(tmp_path, Trainer(monkeypatch), 1)
    usual = trainable_room.composed
    monkeypatch.setattr(trainable_room, "composed", lambda args: {**usual(args), "seed": 5})
    with pytest.raises(ValueError, match="in its configuration"):
        searched(tmp_path, Trainer(monkeypatch), 2)


def test_several_at_a_time_draw_different_values(tmp_path, monkeypatch):
    trainer = Trainer(monkeypatch)
    searched(tmp_path, trainer, 6, jobs=3)
    assert len(set(trainer.trained)) == 6


def test_other_values_in_the_same_folder_are_refused(tmp_path, monkeypatch):
    searched(tmp_path, Trainer(monkeypatch), 1)
    with pytest.raises(ValueError, match="in its values: take another run_dir"):
        searched(tmp_path, Trainer(monkeypatch), 2, "optim.lr=0.1,0.2")
    with pytest.raises(ValueError, match="in its settings: .*searched optim.lr"):
        searched(tmp_path, Trainer(monkeypatch), 2, RATE, "seed=3")


def test_other_rows_are_another_search(tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    arguments = (RATE, f"data.path={file}")
    for number in (1, 2):
        file.write_text('{"prompt": "a", "response": "b"}\n' * number)
        if number == 1:
            searched(tmp_path / "s", Trainer(monkeypatch), 1, *arguments)
    with pytest.raises(ValueError, match="in its files"):
        searched(tmp_path / "s", Trainer(monkeypatch), 2, *arguments)


def test_a_search_whose_first_trial_cannot_train_ends_at_once(tmp_path):
    def fails(cell, environment, stopped):
        return {"status": "failed", "steps": 0, "ended": "no rows", "val_loss": None}

    with pytest.raises(ValueError, match="cannot train: no rows"):
        searched(tmp_path, fails, 5)

    def trains(cell, environment, stopped):
        return {"status": "completed", "steps": 1, "ended": "", "val_loss": 1.0}

    searched(tmp_path, trains, 1, "optim.lr=0.1,0.2")  # what was wrong may be what was searched


def test_runs_of_unequal_length_are_not_held_against_each_other(tmp_path, monkeypatch):
    trainer = Trainer(monkeypatch)
    search = searched(tmp_path, trainer, 8, RATE, "data.batch_size=1,2")
    assert TrialState.PRUNED not in {one.state for one in search.study.get_trials()}


def test_a_folder_has_one_search_at_a_time(tmp_path):
    with (
        alone_in(tmp_path / "one"),
        pytest.raises(ValueError, match="another process"),
        alone_in(tmp_path / "one"),
    ):
        pass


def _study(folder):
    return Search(space_of([*SMALL, RATE]), folder, seed=0).study.get_trials()
