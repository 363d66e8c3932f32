"""Train what a comparison needs: each method at several rates, and at its best one with all seeds.

Only runs are kept, no other state: a comparison that was stopped goes through the same decisions
again, reads the runs that have finished, and trains the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_ft.comparison.cells import Cell
from lit_ft.comparison.grid import Grid
from lit_ft.comparison.rates import NoRateHelpsError, best_rate
from lit_ft.comparison.runs import loss_of
from lit_ft.comparison.settings import LEARNING_RATE, SEED
from lit_ft.comparison.trainable import Trainable, trainable
from lit_ft.comparison.trials import fails_before_training, pruned_against
from lit_ft.comparison.workers import Workers


@dataclass
class Sweep:
    """The runs of a comparison, which it trains or reads.

    Args:
        grid: The grid of what is compared.
        folder: The folder of the comparison.

    Attributes:
        methods: The methods, each with its configuration.
        cells: The runs so far, in the order in which they were needed.

    Raises:
        ValueError: If an argument is wrong.
    """

    grid: Grid
    folder: Path
    cells: list[Cell] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.methods = [trainable(arguments) for arguments in self.grid.methods]

    def run(self, workers: Workers) -> None:
        """Train all that has not finished, several methods at a time."""
        workers.each(lambda method: self._run_method(method, workers), self.methods)

    def _run_method(self, method: Trainable, workers: Workers) -> None:
        start = method.learning_rate
        first, *others = self.grid.seeds
        if start is None:
            for seed in self.grid.seeds:
                workers.summary(self._cell(method, None, seed), {})
            return
        tried: list[Mapping[str, Any]] = []

        def loss_at(rate: float) -> float | None:
            with pruned_against(tried) as environment:
                summary = workers.summary(self._cell(method, rate, first), environment)
            tried.append(summary)
            if len(tried) == 1 and (
                fails_before_training(summary) or summary["status"] == "out_of_memory"
            ):
                raise NoRateHelpsError
            return loss_of(summary)

        given = self.grid.rates or (() if self.grid.tune else (start,))
        best = best_rate(loss_at, start=start, given=given)
        if best is not None:
            for seed in others:
                workers.summary(self._cell(method, best, seed), {})

    def _cell(self, method: Trainable, rate: float | None, seed: int) -> Cell:
        at_rate = [] if rate is None else [f"{LEARNING_RATE}={rate:g}"]
        cell = method.cell([*at_rate, f"{SEED}={seed}"], self.grid.swept, self.folder)
        self.cells.append(cell)
        return cell
