"""What the report says: a row for each method, the runs without a result, and what is unequal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lit_ft.comparison.methods import Method, Trial, methods_of
from lit_ft.comparison.names import name_of_run, names_of, shared_arguments
from lit_ft.comparison.noise import Difference, paired_difference
from lit_ft.comparison.pareto import on_front
from lit_ft.comparison.runs import Damaged, Run, folder_order
from lit_ft.comparison.unequal import unequal


@dataclass(frozen=True)
class Row:
    """A method among the others.

    Attributes:
        number: The place of the method, from 1 for the lowest loss.
        name: The settings in which the method differs from the others.
        method: The method.
        is_best: Whether no method has a lower loss.
        difference: How far its loss is above that of the best one; None if that cannot be said.
        share_of_fall: The fall of its loss during training, as a share of the best one's.
        is_on_front: Whether no other method has less loss and no more memory, or the reverse.
    """

    number: int
    name: str
    method: Method
    is_best: bool
    difference: Difference | None
    share_of_fall: float | None
    is_on_front: bool

    @property
    def trial(self) -> Trial:
        """The trial whose figures the row shows."""
        return self.method.best


@dataclass(frozen=True)
class WithoutResult:
    """A folder that no row counts.

    Attributes:
        folder: The folder.
        status: The status of the run, or "damaged".
        name: The settings of the run; empty if they are not known.
        reason: Why there is no result.
        run: The run; None if its summary cannot be read.
    """

    folder: Path
    status: str
    name: str
    reason: str
    run: Run | None


@dataclass(frozen=True)
class Comparison:
    """All that a report says.

    Attributes:
        rows: The methods, those with the lowest loss first.
        without: The runs without a result, and the folders whose summary cannot be read.
        shared: The arguments that all runs have.
        warnings: What the compared runs do not have in common, in sentences.
    """

    rows: Sequence[Row]
    without: Sequence[WithoutResult]
    shared: Sequence[str]
    warnings: Sequence[str]

    @property
    def compared(self) -> list[Run]:
        """The runs whose figures the rows show."""
        return [run for row in self.rows for run in row.trial.runs]


def compare(runs: Sequence[Run], damaged: Sequence[Damaged] = ()) -> Comparison:
    """Compare runs, whatever their order.

    Args:
        runs: The runs.
        damaged: The folders that cannot be compared.
    """
    methods = methods_of(runs)
    firsts = [method.best.runs[0] for method in methods]
    rows, shared = _rows(methods), shared_arguments(firsts)
    reference = firsts[0].settings if firsts else {}
    without = [
        WithoutResult(run.folder, run.status, name_of_run(run, shared, reference), run.reason, run)
        for run in runs
        if run.loss is None
    ]
    without += [WithoutResult(one.folder, "damaged", "", one.reason, None) for one in damaged]
    return Comparison(
        rows=rows,
        without=sorted(without, key=lambda one: folder_order(one.folder)),
        shared=shared,
        warnings=unequal([(row.number, row.method) for row in rows]),
    )


def _rows(methods: Sequence[Method]) -> list[Row]:
    names = names_of([method.best.runs[0] for method in methods])
    front = on_front([_memory_and_loss(method.best) for method in methods])
    best = methods[0].best if methods else None
    return [
        Row(
            number=number,
            name=name,
            method=method,
            is_best=number == 1,
            difference=None if number == 1 else _difference(method.best, best),
            share_of_fall=_share(method.best, best),
            is_on_front=is_on_front,
        )
        for number, (name, method, is_on_front) in enumerate(
            zip(names, methods, front, strict=True), start=1
        )
    ]


def _difference(trial: Trial, best: Trial | None) -> Difference | None:
    return None if best is None else paired_difference(trial.losses, best.losses)


def _share(trial: Trial, best: Trial | None) -> float | None:
    fall, of_best = trial.fall, None if best is None else best.fall
    return fall / of_best if fall is not None and of_best is not None and of_best > 0 else None


def _memory_and_loss(trial: Trial) -> tuple[float, float] | None:
    peak = trial.highest("peak_bytes", "value")
    return None if peak is None else (peak, trial.loss.mean)
