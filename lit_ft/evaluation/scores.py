"""Scores under plain names, out of lm-eval's results."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from numbers import Real
from typing import Any

Scores = dict[str, dict[str, float]]
"""The values of each task's metrics, and their standard errors as `METRIC_stderr`."""

_STDERR = "_stderr"
_NO_FILTER = "none"


def scores_of(results: Mapping[str, Any], names: Collection[str]) -> Scores:
    """Return the scores of some tasks and groups.

    A group that has no score of its own stands for its members.

    Args:
        results: The results as `lm_eval.evaluate` returns them.
        names: The names of the tasks and groups.
    """
    members: Mapping[str, Any] = results.get("group_subtasks", {})
    return {name: _plain(results["results"][name]) for name in _scored(names, results, members)}


def metrics_of(values: Mapping[str, Any]) -> list[str]:
    """Return the names of a task's metrics in lm-eval's order, which has the usual one in front.

    >>> metrics_of({"acc": 0.5, "acc_stderr": 0.1, "acc_norm": 0.6})
    ['acc', 'acc_norm']
    """
    return [name for name in values if not name.endswith(_STDERR)]


def stderr_of(metric: str) -> str:
    """Return the name under which a metric's standard error stands."""
    return f"{metric}{_STDERR}"


def _scored(
    names: Collection[str], results: Mapping[str, Any], members: Mapping[str, Any]
) -> Iterator[str]:
    for name in names:
        if _plain(results["results"].get(name, {})):
            yield name
        else:
            yield from _scored(members.get(name, []), results, members)


def _plain(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers among a task's values, which lm-eval calls `METRIC,FILTER`."""
    found = {}
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if comma and isinstance(value, Real):  # a standard error that is not known is "N/A"
            suffix = _STDERR if metric.endswith(_STDERR) else ""
            own = metric.removesuffix(_STDERR)
            name = own if filtered == _NO_FILTER else f"{own} ({filtered})"
            found[f"{name}{suffix}"] = float(value)
    return found
