"""The machine, the versions and the commands of a comparison, as texts."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping

from lit_ft.comparison.comparison import Comparison, Row
from lit_ft.comparison.runs import Run
from lit_ft.terminal.console import format_bytes, format_count


def facts(comparison: Comparison) -> Iterator[tuple[str, str]]:
    """Yield what the compared runs ran on, each with a word for what it is about."""
    trials = [trial for row in comparison.rows for trial in row.method.trials]
    counts = [
        format_count(sum(len(trial.runs) for trial in trials), "completed run"),
        f"{len(comparison.without):,} without a result" if comparison.without else "",
    ]
    yield "runs", ", ".join(one for one in counts if one)
    if comparison.shared:
        yield "all runs have", shlex.join(comparison.shared)
    compared = comparison.compared
    yield from _distinct("machine", compared, _machine)
    yield from _distinct("versions", compared, _versions)
    yield from _distinct("commit", compared, lambda run: str(run.get("commit") or ""))


def commands(row: Row) -> list[str]:
    """Return the command of each run whose figures a row shows."""
    return [
        f"python train.py {shlex.join(run.arguments)}"
        for run in row.trial.runs
        if run.arguments is not None
    ]


def _distinct(what: str, runs: list[Run], fact: Callable[[Run], str]) -> Iterator[tuple[str, str]]:
    for one in dict.fromkeys(map(fact, runs)):
        if one:
            yield what, one


def _machine(run: Run) -> str:
    gpus, cpu = run.get("hardware", "gpus"), run.get("hardware", "cpu")
    parts = [str(gpu) for gpu in gpus] if isinstance(gpus, list) else []
    cores, memory = run.number("hardware", "cpu_cores"), run.number("hardware", "memory_bytes")
    parts += [] if cpu is None else [str(cpu)]
    parts += [] if cores is None else [format_count(int(cores), "core")]
    parts += [] if memory is None else [format_bytes(memory)]
    return ", ".join(parts)


def _versions(run: Run) -> str:
    versions = run.get("versions")
    if not isinstance(versions, Mapping):
        return ""
    return ", ".join(f"{name} {version}" for name, version in versions.items())
