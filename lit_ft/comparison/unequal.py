"""What compared runs do not have in common although a fair comparison needs it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from lit_ft.comparison.methods import Method
from lit_ft.comparison.runs import Run
from lit_ft.comparison.scores import metrics_of_tasks
from lit_ft.comparison.settings import differing, key_of
from lit_ft.run.types import as_typed

# Settings of the data that change neither the rows nor what is learnt of them.
_NOT_OF_THE_ROWS = ("data.num_workers", "data.batch_size", "data.val_batch_size")

# Settings under `eval` that decide what the score of a task is about.
_OF_A_SCORE = ("limit", "num_fewshot", "apply_chat_template")


def unequal(methods: Sequence[tuple[int, Method]]) -> list[str]:
    """Return a sentence for each thing that the compared runs do not have in common.

    Args:
        methods: The methods with the numbers of their rows.
    """
    return [
        *_differences("hardware", "speed and memory cannot be compared", methods, _hardware),
        *_differences("versions of the libraries", "figures may differ", methods, _versions),
        *_differences("kinds of memory", "peaks cannot be compared", methods, _kind_of_memory),
        *_differences("models", "losses cannot be compared", methods, _model),
        *_differences("data", "losses cannot be compared", methods, _telling_data(methods)),
        *_rows_of_a_seed(methods),
        *_differences("numbers of steps", "longer runs have an advantage", methods, _steps),
        *_differences("rows in a step", "larger steps see more data", methods, _rows_per_step),
        *_scored_in_other_ways(methods),
        *_trials(methods),
        *_edges(methods),
    ]


def _differences(
    what: str,
    consequence: str,
    methods: Sequence[tuple[int, Method]],
    fact: Callable[[Run], str | None],
) -> Iterator[str]:
    """Yield a sentence if not all runs have the same fact; what is not known differs in nothing."""
    rows: dict[str, set[int]] = {}
    for number, method in methods:
        for run in method.best.runs:
            if (found := fact(run)) is not None:
                rows.setdefault(found, set()).add(number)
    if len(rows) > 1:
        told = "; ".join(f"{fact} (rows {_listed(found)})" for fact, found in rows.items())
        yield f"The runs have different {what}, so {consequence}: {told}."


def _hardware(run: Run) -> str | None:
    gpus, cpu, cores = (run.get("hardware", name) for name in ("gpus", "cpu", "cpu_cores"))
    if isinstance(gpus, list) and gpus:
        return ", ".join(f"{count} x {gpu}" for gpu, count in Counter(map(str, gpus)).items())
    return None if cpu is None else f"{cpu}, {cores} cores"


def _versions(run: Run) -> str | None:
    torch, own = run.get("versions", "torch"), run.get("versions", "lit_ft")
    return None if torch is None else f"torch {torch}, lit_ft {own}"


def _kind_of_memory(run: Run) -> str | None:
    source = run.get("peak_bytes", "source")
    return None if source is None else str(source)


def _model(run: Run) -> str | None:
    name = run.get("model", "name")
    return None if name is None else str(name)


def _data(run: Run) -> dict[str, Any]:
    """Return the settings that decide which rows are read and what is learnt of them."""
    return {
        name: value
        for name, value in run.settings.items()
        if name.startswith("data.") and name not in _NOT_OF_THE_ROWS
    }


def _telling_data(methods: Sequence[tuple[int, Method]]) -> Callable[[Run], str | None]:
    told = sorted(differing([_data(run) for _, method in methods for run in method.best.runs]))

    def fact(run: Run) -> str | None:
        return " ".join(f"{name}={run.settings.get(name)}" for name in told) or None

    return fact


def _steps(run: Run) -> str | None:
    steps = run.number("steps")
    return None if steps is None else f"{steps:,.0f}"


def _rows_per_step(run: Run) -> str | None:
    rows = run.number("data", "rows_per_step")
    return None if rows is None else f"{rows:,.0f}"


def _rows_of_a_seed(methods: Sequence[tuple[int, Method]]) -> Iterator[str]:
    """Yield a sentence if runs of the same seed and settings of the data count different rows."""
    counts: dict[Any, dict[str, set[int]]] = {}
    for number, method in methods:
        for run in method.best.runs:
            splits = {name: run.get("data", name) for name in ("train", "val")}
            if any(splits.values()):
                same = counts.setdefault((run.seed, key_of(_data(run))), {})
                same.setdefault(key_of(splits), set()).add(number)
    for (seed, _), rows in counts.items():
        if len(rows) > 1:
            told = " against ".join(f"rows {_listed(found)}" for found in rows.values())
            yield (
                f"With seed {seed}, the runs have read different data, so losses cannot be "
                f"compared: {told}."
            )
            return


def _scored_in_other_ways(methods: Sequence[tuple[int, Method]]) -> Iterator[str]:
    """Yield a sentence for the tasks on which runs are scored with different settings."""
    tasks = metrics_of_tasks(run for _, method in methods for run in method.best.runs)
    told: dict[str, list[str]] = {}
    for task in tasks:
        for said in _differences("", "", methods, partial(_way_of_scoring, task)):
            told.setdefault(said.partition(": ")[2], []).append(task)
    for ways, alike in told.items():
        yield (
            f"The runs are scored on {', '.join(alike)} with different settings, so these scores "
            f"cannot be compared: {ways}"
        )


def _way_of_scoring(task: str, run: Run) -> str | None:
    scores = run.get("scores")
    if not isinstance(scores, Mapping) or task not in scores:
        return None
    found = {name: run.get("config", "eval", name) for name in _OF_A_SCORE}
    return " ".join(f"eval.{name}={as_typed(value)}" for name, value in found.items())


def _trials(methods: Sequence[tuple[int, Method]]) -> Iterator[str]:
    tried = {method.rates_tried for _, method in methods}
    if tried and max(tried) > 2 * min(tried):  # a search looks at three or a few more
        yield (
            f"Between {min(tried)} and {max(tried)} learning rates were tried for a row. The best "
            "of many looks better than it is."
        )


def _edges(methods: Sequence[tuple[int, Method]]) -> Iterator[str]:
    for end, further in (("highest", "higher"), ("lowest", "lower")):
        if rows := {number for number, method in methods if method.best_is == end}:
            yield (
                f"The best learning rate is the {end} that was tried, so a {further} one may be "
                f"better: rows {_listed(rows)}."
            )


def _listed(numbers: set[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))
