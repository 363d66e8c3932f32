"""Train what a comparison needs: each method at several rates, and at its best one with all seeds.

Only runs are kept, no other state: a comparison that was stopped goes through the same decisions
again, reads the runs that have finished, and trains the others.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any

from lit_ft.comparison.cells import Cell, cell_of, files_of
from lit_ft.comparison.grid import Grid
from lit_ft.comparison.rates import NoRateHelpsError, best_rate
from lit_ft.comparison.settings import LEARNING_RATE, SEED
from lit_ft.run.arguments import composed
from lit_ft.run.override import name_of
from lit_ft.run.trial import environment_of_trial, study_in

_RUNGS = 4  # validations of a run, at which bad rates end
# Nothing is kept of a run but its figures.
_NOT_NEEDED = ("samples", "last_checkpoint", "best_checkpoint", "export")


@dataclass
class Sweep:
    """The runs of a comparison, which it trains or reads.

    Args:
        grid: The grid of what is compared.
        folder: The folder of the comparison.
        train: The function that trains a cell that has not finished, with variables to set in the
            environment, and returns its summary. It stops when the event is set.

    Attributes:
        methods: The methods, each with its configuration.
        cells: The runs so far, in the order in which they were needed.

    Raises:
        ValueError: If an argument is wrong.
    """

    grid: Grid
    folder: Path
    train: Callable[[Cell, Mapping[str, str], Event], Mapping[str, Any]]
    cells: list[Cell] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.methods = [_method(arguments) for arguments in self.grid.methods]
        self._stopped = Event()
        self._shares: SimpleQueue[Mapping[str, str]] = SimpleQueue()

    def run(self, shares: Sequence[Mapping[str, str]] = ({},)) -> None:
        """Train all that has not finished, several methods at a time.

        Args:
            shares: The variables to set for each of the runs at a time.
        """
        for share in shares:
            self._shares.put(share)
        with ThreadPoolExecutor(len(shares)) as pool:
            running = [pool.submit(self._run_method, method) for method in self.methods]
            try:
                for done in as_completed(running):
                    done.result()
            except BaseException:
                self._stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _run_method(self, method: Method) -> None:
        first, *others = self.grid.seeds
        if method.start is None:
            for seed in self.grid.seeds:
                self._summary(self._cell(method, None, seed))
            return
        tried: list[Mapping[str, Any]] = []

        def loss_at(rate: float) -> float | None:
            summary = self._trial(self._cell(method, rate, first), tried)
            tried.append(summary)
            if len(tried) == 1 and _fails_anyway(summary):
                raise NoRateHelpsError
            return _loss(summary)

        given = self.grid.rates or (() if self.grid.tune else (method.start,))
        best = best_rate(loss_at, start=method.start, given=given)
        if best is not None:
            for seed in others:
                self._summary(self._cell(method, best, seed))

    def _trial(self, cell: Cell, earlier: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Train a run that ends early if its loss is worse than that of earlier rates."""
        if not earlier:
            return self._summary(cell)
        with tempfile.TemporaryDirectory() as folder:
            journal = Path(folder) / "study"
            study = study_in(journal, create=True)
            for summary in earlier:
                trial = study.ask()
                for number, loss in enumerate(_validations(summary), 1):
                    trial.report(loss, number)
                    trial.should_prune()  # the pruner remembers those that it was asked about
                study.tell(trial, state=_state_of(summary), values=_loss(summary))
            return self._summary(cell, environment_of_trial(journal))

    def _summary(
        self, cell: Cell, environment: Mapping[str, str] | None = None
    ) -> Mapping[str, Any]:
        self.cells.append(cell)
        if (summary := cell.finished()) is not None:
            return summary
        share = self._shares.get()
        try:
            return self.train(cell, {**share, **(environment or {})}, self._stopped)
        finally:
            self._shares.put(share)

    def _cell(self, method: Method, rate: float | None, seed: int) -> Cell:
        choices = [one for one in method.arguments if name_of(one) in self.grid.swept]
        own = (
            [f"{SEED}={seed}"] if rate is None else [f"{LEARNING_RATE}={rate:g}", f"{SEED}={seed}"]
        )
        arguments = [*method.arguments, *own]
        settings = {
            "config": {name: one for name, one in method.config.items() if name != "compare"},
            "arguments": sorted(arguments),
            "files": method.files,
        }
        return cell_of(" ".join([*choices, *own]), arguments, settings, self.folder)


@dataclass(frozen=True)
class Method:
    """A method to train.

    Attributes:
        arguments: The arguments of its runs, without a learning rate and a seed.
        config: The configuration of its runs, as plain values.
        files: The sizes and times of the files that its runs read.
    """

    arguments: Sequence[str]
    config: Mapping[str, Any]
    files: Mapping[str, Any]

    @property
    def start(self) -> float | None:
        """The learning rate to start from; None if the optimizer sets its own."""
        rate = self.config["optim"].get("lr")
        return None if rate is None else float(rate)


def _method(arguments: Sequence[str]) -> Method:
    config = composed([*arguments, "run_dir=RUN_DIR"])
    return Method(_arguments_of(arguments, config), config, files_of(config))


def _arguments_of(method: Sequence[str], config: Mapping[str, Any]) -> list[str]:
    """Return the arguments of a method, with those that make a run one of a comparison."""
    given = {name_of(one) for one in method}
    own = [f"~callbacks.{name}" for name in _NOT_NEEDED if name in (config["callbacks"] or {})]
    if config["callbacks"] and "forgetting" not in config["callbacks"]:
        own.append("+callbacks.forgetting._target_=lit_ft.callbacks.Forgetting")
    if "logger" not in given:
        own.append("logger=none")
    if "trainer.val_check_interval" not in given:
        own += _rungs(config["trainer"])
    return [*method, *own]


def _rungs(trainer: Mapping[str, Any]) -> Iterator[str]:
    """Yield the setting with which a run validates a few times, after equal numbers of rows."""
    if trainer["max_steps"] >= _RUNGS:
        micro_batches = trainer["max_steps"] * trainer["accumulate_grad_batches"]
        yield f"trainer.val_check_interval={micro_batches // _RUNGS}"
    elif trainer["max_epochs"] == 1:
        yield f"trainer.val_check_interval={1 / _RUNGS}"
        yield "trainer.check_val_every_n_epoch=1"  # Lightning takes parts of epochs with it alone


def _validations(summary: Mapping[str, Any]) -> list[float]:
    """Return the validation losses during training, in their order."""
    history = summary.get("history") or {}
    found = [point["val_loss"] for point in history.get("val", []) if point["step"] > 0]
    return [loss for loss in found if loss is not None]


def _loss(summary: Mapping[str, Any]) -> float | None:
    loss = summary["val_loss"] if summary["status"] == "completed" else None
    return None if loss is None else float(loss)


def _fails_anyway(summary: Mapping[str, Any]) -> bool:
    """Whether a run failed for a reason that has nothing to do with its learning rate."""
    failed = summary["status"] == "failed" and not summary.get("steps")
    return failed or bool(summary["status"] == "out_of_memory")


def _state_of(summary: Mapping[str, Any]) -> Any:
    from optuna.trial import TrialState

    if _loss(summary) is not None:
        return TrialState.COMPLETE
    return TrialState.PRUNED if summary["status"] == "pruned" else TrialState.FAIL
