"""The scores of runs on downstream tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lit_ft.comparison.runs import Run
from lit_ft.evaluation.scores import metrics_of


def metrics_of_tasks(runs: Iterable[Run]) -> dict[str, list[str]]:
    """Return the metrics of each task that a run is scored on, in the order of the summaries."""
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        scores = run.get("scores")
        for task, values in scores.items() if isinstance(scores, Mapping) else ():
            if isinstance(values, Mapping):
                found.setdefault(task, {}).update(dict.fromkeys(metrics_of(values)))
    return {task: list(metrics) for task, metrics in found.items()}
