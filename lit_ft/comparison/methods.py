"""Methods: runs that differ in the seed alone, at the best of the learning rates tried."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lit_ft.comparison.runs import Run
from lit_ft.comparison.settings import LEARNING_RATE, key_of
from lit_ft.comparison.spread import Spread, spread


@dataclass(frozen=True)
class Trial:
    """The completed runs of a method at one learning rate, which differ in the seed alone.

    Attributes:
        runs: The runs, at least one, in the order of their seeds.
    """

    runs: tuple[Run, ...]

    @property
    def learning_rate(self) -> Any:
        """The learning rate; None if the optimizer sets its own."""
        return self.runs[0].settings.get(LEARNING_RATE)

    @cached_property
    def losses(self) -> dict[int, float]:
        """The held-out loss of each seed; of several runs with the same seed, their mean."""
        by_seed: dict[int, list[float]] = {}
        for run in self.runs:
            if run.seed is not None and run.loss is not None:
                by_seed.setdefault(run.seed, []).append(run.loss)
        return {seed: statistics.fmean(sorted(found)) for seed, found in sorted(by_seed.items())}

    @cached_property
    def loss(self) -> Spread:
        """The held-out loss over all runs."""
        found = spread(run.loss for run in self.runs)
        assert found is not None  # only runs with a loss are compared
        return found

    @property
    def fall(self) -> float | None:
        """How far the held-out loss fell during training, on average."""
        falls = [
            initial - run.loss
            for run in self.runs
            if run.loss is not None and (initial := run.number("initial_val_loss")) is not None
        ]
        found = spread(falls)
        return None if found is None else found.mean

    def spread_of(self, *path: str) -> Spread | None:
        """Return the mean and the spread of an entry of the summaries."""
        return spread(run.number(*path) for run in self.runs)

    def mean(self, *path: str) -> float | None:
        """Return the mean of an entry of the summaries."""
        found = self.spread_of(*path)
        return None if found is None else found.mean

    def highest(self, *path: str) -> float | None:
        """Return the highest value of an entry of the summaries."""
        found = [value for run in self.runs if (value := run.number(*path)) is not None]
        return max(found, default=None)


@dataclass(frozen=True)
class Method:
    """The settings of a row: all but the seed and the learning rate.

    Attributes:
        trials: The learning rates with a loss, the best one first.
        pruned: The runs that were ended early because their rate was worse than others.
    """

    trials: tuple[Trial, ...]
    pruned: tuple[Run, ...] = ()

    @property
    def best(self) -> Trial:
        """The trial whose figures the row shows.

        It has the lowest mean loss of those with the most seeds. A rate that only the first seed
        has tried may have a lower loss because that seed is an easy one.
        """
        return self.trials[0]

    @property
    def rates_tried(self) -> int:
        """The number of learning rates that were tried, those included that ended early."""
        return len(self._rates)

    @property
    def best_is(self) -> str:
        """How the best rate compares with all that were tried: highest, lowest or between."""
        rates = sorted(rate for rate in self._rates if isinstance(rate, int | float))
        if len(rates) < 2 or self.best.learning_rate not in (rates[0], rates[-1]):
            return "between"
        return "highest" if self.best.learning_rate == rates[-1] else "lowest"

    @property
    def _rates(self) -> set[Any]:
        rates = [trial.learning_rate for trial in self.trials]
        return {*rates, *(run.settings.get(LEARNING_RATE) for run in self.pruned)}


def methods_of(runs: Iterable[Run]) -> list[Method]:
    """Return the methods that have a run with a loss, the lowest loss first."""
    methods = []
    for same in _grouped(runs, _settings_but_rate):
        trials = [
            Trial(tuple(sorted(at_rate, key=_by_seed)))
            for at_rate in _grouped(
                (run for run in same if run.loss is not None), lambda run: key_of(run.settings)
            )
        ]
        if trials:
            trials.sort(key=lambda trial: (-len(trial.losses), *_by_loss(trial)))
            pruned = sorted((run for run in same if run.is_pruned), key=_by_seed)
            methods.append(Method(tuple(trials), tuple(pruned)))
    return sorted(methods, key=lambda method: _by_loss(method.best))


def _grouped(runs: Iterable[Run], key: Callable[[Run], str]) -> Sequence[list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return list(groups.values())


def _settings_but_rate(run: Run) -> str:
    return key_of({name: value for name, value in run.settings.items() if name != LEARNING_RATE})


def _by_seed(run: Run) -> tuple[int, str]:
    return (-1 if run.seed is None else run.seed, str(run.folder))


def _by_loss(trial: Trial) -> tuple[float, str]:
    """Return what sorts by loss; the settings decide between equals, whatever the folders are."""
    return (trial.loss.mean, key_of(trial.runs[0].settings))
