"""A comparison trains what it needs, ends bad rates early, and keeps what has finished."""

from __future__ import annotations

import math
from threading import Barrier, Event
from typing import Any

import pytest

from lit_ft.comparison.grid import grid_of, in_full
from lit_ft.comparison.sweep import Sweep
from lit_ft.comparison.workers import Workers
from lit_ft.run.trial import callbacks_of_trial
from lit_ft.storage.json_file import write_json

SMALL = ["model=tiny", "data.max_length=32", "trainer.max_steps=8"]
BEST = {"adamw": 4e-4, "sgd": 0.015, "adafactor": 1.0}  # adamw's is beyond the first three rates


class Killed(Exception):
    pass


class Trainer:
    """Stands in for train.py: the loss falls, faster the closer the rate is to the best one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, lives: float = math.inf) -> None:
        self.monkeypatch = monkeypatch
        self.lives = lives
        self.trained: list[tuple[str, ...]] = []
        self.steps = 0

    def __call__(self, cell: Any, environment: dict[str, str], stopped: Event) -> dict[str, Any]:
        if self.lives <= 0:
            raise Killed
        self.lives -= 1
        self.trained.append(cell.arguments)
        settings = dict(one.split("=") for one in cell.arguments if "=" in one)
        best = BEST[settings["optim"]]
        away = abs(math.log(float(settings.get("optim.lr", best)) / best))
        losses = [3 + away - 0.1 * step + 0.01 * int(settings["seed"]) for step in range(1, 5)]
        for name, value in environment.items():
            self.monkeypatch.setenv(name, value)
        trials, seen = callbacks_of_trial(), losses
        self.monkeypatch.delenv("LIT_FT_TRIAL", raising=False)
        for number, loss in enumerate(losses[:-1], 1):
            for one in trials:
                one.trial.report(loss, number)
                if one.trial.should_prune():
                    seen = losses[:number]
        seen = next((losses[:n] for n in range(1, 5) if seen == losses[:n]), losses)
        self.steps += 2 * len(seen)
        summary = {
            "status": "completed" if seen == losses else "pruned",
            "config": {},
            "val_loss": losses[-1] if seen == losses else None,
            "history": {
                "val": [{"step": 2 * n, "val_loss": one} for n, one in enumerate(seen, 1)],
            },
        }
        cell.folder.mkdir(parents=True, exist_ok=True)
        write_json(cell.folder / "summary.json", summary)
        return summary


def swept(folder, trainer, *arguments, tune=True):
    section = {"methods": [], "seeds": [0], "tune": tune}
    sweep = Sweep(in_full(grid_of([*SMALL, *arguments]), section), folder)
    sweep.run(Workers(trainer))
    return sweep


def rates(trained, optim, seed):
    own = [one for one in trained if f"optim={optim}" in one and f"seed={seed}" in one]
    return [float(one.split("=")[1]) for cell in own for one in cell if one.startswith("optim.lr=")]


ARGUMENTS = ("optim=adamw,sgd", "seed=0,1,2")


def test_each_method_has_its_own_best_rate_with_all_seeds(tmp_path, monkeypatch):
    trainer = Trainer(monkeypatch)
    swept(tmp_path, trainer, *ARGUMENTS)
    assert rates(trainer.trained, "adamw", 0) == [1e-4, 2e-4, 5e-5, 4e-4, 8e-4]
    assert rates(trainer.trained, "sgd", 0) == [0.03, 0.06, 0.015, 0.0075]
    for seed in (1, 2):
        assert rates(trainer.trained, "adamw", seed) == [4e-4]
        assert rates(trainer.trained, "sgd", seed) == [0.015]


def test_bad_rates_end_early(tmp_path, monkeypatch):
    trainer = Trainer(monkeypatch)
    sweep = swept(tmp_path, trainer, *ARGUMENTS)
    pruned = [cell.arguments for cell in sweep.cells if cell.finished()["status"] == "pruned"]
    assert rates(pruned, "adamw", 0) == [5e-5]
    assert rates(pruned, "sgd", 0) == [0.06]
    # 9 rates with 3 seeds take 27 runs of 8 steps.
    assert trainer.steps < 27 * 8 * 0.5


def test_a_second_time_trains_nothing(tmp_path, monkeypatch):
    first = swept(tmp_path, Trainer(monkeypatch), *ARGUMENTS)
    idle = Trainer(monkeypatch, lives=0)
    assert swept(tmp_path, idle, *ARGUMENTS).cells == first.cells


@pytest.mark.parametrize("lives", [1, 4, 10])
def test_one_that_was_killed_goes_on_to_the_same_runs(tmp_path, monkeypatch, lives):
    whole = swept(tmp_path / "whole", Trainer(monkeypatch), *ARGUMENTS)
    killed = Trainer(monkeypatch, lives=lives)
    with pytest.raises(Killed):
        swept(tmp_path / "killed", killed, *ARGUMENTS)
    resumed = Trainer(monkeypatch)
    cells = swept(tmp_path / "killed", resumed, *ARGUMENTS).cells
    assert [cell.arguments for cell in cells] == [cell.arguments for cell in whole.cells]
    assert len(resumed.trained) == len(whole.cells) - lives
    for one, other in zip(cells, whole.cells, strict=True):
        assert one.finished() == other.finished()


def test_a_changed_setting_trains_again_what_it_is_part_of(tmp_path, monkeypatch):
    swept(tmp_path, Trainer(monkeypatch), *ARGUMENTS)
    changed = Trainer(monkeypatch)
    swept(tmp_path, changed, "optim=adamw", "seed=0,1,2,3")
    assert rates(changed.trained, "adamw", 3) == [4e-4] and len(changed.trained) == 1
    swept(tmp_path, changed, "optim=adamw", "optim.weight_decay=0.5", "optim.lr=1e-4")
    assert len(changed.trained) == 2


def test_other_rows_in_the_same_file_make_other_runs(tmp_path, monkeypatch):
    file, trainer = tmp_path / "rows.jsonl", Trainer(monkeypatch)
    arguments = ("optim=adafactor", f"data.path={file}")
    for number in (1, 1, 2):
        if not file.exists() or number == 2:
            file.write_text('{"prompt": "a", "response": "b"}\n' * number)
        swept(tmp_path / "runs", trainer, *arguments)
    assert len(trainer.trained) == 2
    assert "trainer.max_steps=8" in trainer.trained[0]


def test_an_epoch_is_validated_in_quarters(tmp_path, monkeypatch):
    trainer = Trainer(monkeypatch)
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "response": "b"}\n')
    arguments = ["optim=adafactor", f"data.path={file}", "trainer.max_steps=-1"]
    swept(tmp_path / "runs", trainer, *arguments)
    [cell] = trainer.trained
    assert "trainer.val_check_interval=0.25" in cell


def test_an_optimizer_with_a_rate_of_its_own_trains_once_with_each_seed(tmp_path, monkeypatch):
    trainer = Trainer(monkeypatch)
    swept(tmp_path, trainer, "optim=adafactor", "seed=3,4")
    assert [cell[-1] for cell in trainer.trained] == ["seed=3", "seed=4"]
    assert not any("optim.lr" in one for cell in trainer.trained for one in cell)


def test_without_tuning_a_method_trains_at_its_own_rate(tmp_path, monkeypatch):
    trainer = Trainer(monkeypatch)
    swept(tmp_path, trainer, *ARGUMENTS, tune=False)
    for seed in (0, 1, 2):
        assert rates(trainer.trained, "adamw", seed) == [1e-4]
        assert rates(trainer.trained, "sgd", seed) == [0.03]


def test_methods_train_side_by_side_each_with_a_share_of_its_own(tmp_path):
    both, seen = Barrier(2, timeout=60), []

    def train(cell, environment, stopped):
        both.wait()  # one alone would wait for ever
        seen.append(environment["SHARE"])
        return {"status": "completed", "val_loss": 1.0}

    section = {"methods": [], "seeds": [0], "tune": False}
    grid = in_full(grid_of([*SMALL, "optim=adamw,adafactor"]), section)
    Sweep(grid, tmp_path).run(Workers(train, [{"SHARE": "one"}, {"SHARE": "other"}]))
    assert sorted(seen) == ["one", "other"]


def test_a_run_that_fails_to_begin_stops_those_beside_it(tmp_path):
    begun = Event()

    def train(cell, environment, stopped):
        if "optim=adamw" in cell.arguments:
            begun.wait(60)
            raise ValueError("no disk")
        begun.set()
        assert stopped.wait(60)
        return {"status": "interrupted", "val_loss": None}

    section = {"methods": [], "seeds": [0], "tune": False}
    grid = in_full(grid_of([*SMALL, "optim=adamw,adafactor"]), section)
    with pytest.raises(ValueError, match="no disk"):
        Sweep(grid, tmp_path).run(Workers(train, [{}, {}]))


def test_the_runs_keep_nothing_but_their_figures(tmp_path, monkeypatch):
    trainer = Trainer(monkeypatch)
    swept(tmp_path, trainer, "optim=adafactor", "callbacks=none")
    [cell] = trainer.trained
    assert not any(one.startswith("~") for one in cell) and "logger=none" in cell
    swept(tmp_path, trainer, "optim=adafactor", "logger=csv", "trainer.val_check_interval=3")
    assert "~callbacks.last_checkpoint" in trainer.trained[-1]
    assert "logger=none" not in trainer.trained[-1]
    assert "trainer.val_check_interval=2" not in trainer.trained[-1]


def test_a_wrong_setting_is_named_before_anything_trains(tmp_path, monkeypatch):
    trainer = Trainer(monkeypatch)
    with pytest.raises(ValueError, match="adamx"):
        swept(tmp_path, trainer, "optim=adamw,adamx")
    assert not trainer.trained
