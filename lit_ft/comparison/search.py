"""Search for the settings with the lowest held-out loss, with Optuna.

The study is a file next to its runs. A search that was stopped trains again the trials that were
under way, and goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

import optuna
from optuna.distributions import distribution_to_json
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from lit_ft.comparison.cells import Cell
from lit_ft.comparison.runs import loss_of
from lit_ft.comparison.space import Space, settings_of
from lit_ft.comparison.trainable import trainable
from lit_ft.comparison.trials import (
    Summary,
    fails_before_training,
    pruned_against,
    state_of,
    validations_of,
)
from lit_ft.comparison.workers import Workers
from lit_ft.run.files import read_summary
from lit_ft.run.override import name_of

_FILE = "study.journal"
_NAME = "search"
_ASKED = "asked"  # the attribute of the study that says what is searched, once a trial has finished
_FOLDER = "folder"  # the attribute of a trial that names the folder of its run
# With these settings, the same number of validations does not mean the same number of rows.
_OF_ROWS = {
    *("trainer.max_steps", "trainer.max_epochs", "trainer.accumulate_grad_batches"),
    *("data", "data.batch_size", "data.max_length", "data.path", "model", "model.name_or_path"),
}


class Search:
    """The trials of a study, which it trains or reads.

    Args:
        space: What is searched.
        folder: The folder of the study and its runs.
        seed: The seed of Optuna's sampler.

    Attributes:
        study: The study.

    Raises:
        ValueError: If the folder holds the study of another search.
    """

    def __init__(self, space: Space, folder: Path, *, seed: int) -> None:
        self.space = space
        self.folder = folder
        self._asked = _asked(space)
        self.study = _study(self._asked, folder, seed)
        self._lock = Lock()  # Hydra composes one configuration at a time
        self._earlier = list(self._finished())

    def run(self, trials: int, workers: Workers) -> None:
        """Train until the study has so many trials that have finished, well or not.

        Raises:
            ValueError: If the first trial fails before its first step, as others would.
        """
        for trial in self.study.get_trials(states=(TrialState.RUNNING,)):
            self.study.tell(trial.number, state=TrialState.FAIL)  # its run was cut
            self.study.enqueue_trial(trial.params)
        left = max(0, trials - len(self._earlier))
        workers.each(lambda _: self._trial(workers), range(left))

    def best(self) -> optuna.trial.FrozenTrial | None:
        """Return the trial with the lowest loss; None if none has completed."""
        completed = self.study.get_trials(states=(TrialState.COMPLETE,))
        return self.study.best_trial if completed else None

    def _trial(self, workers: Workers) -> None:
        with self._lock:
            trial = self.study.ask(dict(self.space.distributions))
            cell = self._cell(trial.params)
            earlier = list(self._earlier)
        with pruned_against([] if self._rows_differ() else earlier) as environment:
            summary = workers.summary(cell, environment)
        if not self._earlier and fails_before_training(summary):
            raise ValueError(
                f"The first trial cannot train: {summary['ended']}\n"
                f"To try the same again, remove {cell.folder}"
            )
        for number, loss in enumerate(validations_of(summary), 1):
            trial.report(loss, number)
        trial.set_user_attr(_FOLDER, cell.folder.name)
        self.study.tell(trial, state=state_of(summary), values=loss_of(summary))
        self.study.set_user_attr(_ASKED, self._asked)
        self._earlier.append(summary)

    def _cell(self, drawn: Mapping[str, Any]) -> Cell:
        names = {name_of(name) for name in self.space.distributions}
        return trainable([*self.space.fixed, *settings_of(drawn)]).cell([], names, self.folder)

    def _rows_differ(self) -> bool:
        return not _OF_ROWS.isdisjoint(map(name_of, self.space.distributions))

    def _finished(self) -> Iterator[Summary]:
        for trial in self.study.get_trials():
            if _FOLDER in trial.user_attrs:
                with suppress(ValueError):  # a damaged one is another trial to train
                    summary = read_summary(self.folder / trial.user_attrs[_FOLDER])
                    if summary is not None:
                        yield summary


def _study(asked: Mapping[str, Any], folder: Path, seed: int) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.JournalStorage(JournalFileBackend(os.fspath(folder / _FILE)))
    study = optuna.create_study(study_name=_NAME, storage=storage, load_if_exists=True)
    earlier = study.user_attrs.get(_ASKED)
    if earlier is None and study.get_trials(deepcopy=False):  # none has finished
        optuna.delete_study(study_name=_NAME, storage=storage)
        study = optuna.create_study(study_name=_NAME, storage=storage)
    # Another sequence of random numbers than that of the trials before.
    study.sampler = optuna.samplers.TPESampler(
        seed=seed + len(study.get_trials(deepcopy=False)), constant_liar=True
    )
    if earlier not in (None, asked):
        changed = next(name for name in asked if earlier.get(name) != asked[name])
        raise ValueError(
            f"{folder} holds another search, which differs in its {changed}: take another run_dir. "
            f"Its settings were {' '.join(earlier['settings']) or 'the defaults'}, and it searched "
            f"{', '.join(earlier['values'])}."
        )
    return study


def _asked(space: Space) -> dict[str, Any]:
    """Return what tells a search from another one, as plain values."""
    drawn = space.distributions.items()
    configs = [method.settings for method in space.methods]
    digested = json.dumps(configs, sort_keys=True, default=str)
    return {
        "settings": sorted(space.fixed),
        "values": {name: distribution_to_json(one) for name, one in drawn},
        "files": json.loads(json.dumps([method.files for method in space.methods])),
        "configuration": hashlib.sha256(digested.encode()).hexdigest(),
    }
