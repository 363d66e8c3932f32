"""Short names of methods: the settings in which each differs from the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lit_ft.comparison.runs import Run
from lit_ft.comparison.settings import LEARNING_RATE, SEED, differing, is_ignored
from lit_ft.run.override import bare_name_of

DEFAULTS = "no settings of its own"


def names_of(firsts: Sequence[Run]) -> list[str]:
    """Return a name for each method, all different.

    A name has the arguments of the command line that not all methods share and that make a
    difference. Where these do not tell two methods apart, the settings themselves follow.

    Args:
        firsts: A run of each method.
    """
    settings = [_without_rate(run.settings) for run in firsts]
    told = differing(settings)
    arguments = [_telling(run.arguments or [], told) for run in firsts]
    shared = set.intersection(*map(set, arguments)) if arguments else set()
    names = [" ".join(one for one in own if one not in shared) for own in arguments]
    counts = Counter(names)
    return [
        name if counts[name] == 1 and name else _with_settings(name, own, told)
        for name, own in _distinguished(names, settings)
    ]


def shared_arguments(runs: Sequence[Run]) -> list[str]:
    """Return the arguments that all runs have, in the order of the first one."""
    lists = [run.arguments or [] for run in runs]
    common = set.intersection(*map(set, lists)) if lists else set()
    return [one for one in (lists[0] if lists else []) if one in common and not _is_ignored(one)]


def name_of_run(run: Run, shared: Sequence[str], reference: Mapping[str, Any]) -> str:
    """Return the settings of a run that has no row: those that others do not share, and its seed.

    Args:
        run: The run.
        shared: The arguments that the compared runs share.
        reference: The settings of another run, from which those of a run without arguments differ.
    """
    if run.arguments is not None:
        own = [one for one in run.arguments if one not in shared and not _is_of_no_run(one)]
    else:
        told = sorted(differing([run.settings, reference]))
        own = [f"{name}={_short(run.settings.get(name))}" for name in told]
        own += [] if run.seed is None else [f"{SEED}={run.seed}"]
    return " ".join(own) or DEFAULTS


def _is_of_no_run(argument: str) -> bool:
    """Whether an argument does not tell one run of a sweep from another one."""
    name = bare_name_of(argument)
    return name not in (SEED, LEARNING_RATE) and is_ignored(name)


def _distinguished(
    names: Sequence[str], settings: Sequence[Mapping[str, Any]]
) -> list[tuple[str, Mapping[str, Any]]]:
    """Return each name with the settings in which its method differs from those of that name."""
    found: list[tuple[str, Mapping[str, Any]]] = []
    for name, own in zip(names, settings, strict=True):
        same = [one for other, one in zip(names, settings, strict=True) if other == name]
        told = differing(same) if len(same) > 1 else set()
        found.append((name, {key: own.get(key) for key in sorted(told)}))
    return found


def _with_settings(name: str, own: Mapping[str, Any], told: set[str]) -> str:
    parts = [f"{key}={_short(value)}" for key, value in own.items() if key in told]
    return " ".join([name, *parts]).strip() or DEFAULTS


def _telling(arguments: Sequence[str], told: set[str]) -> list[str]:
    """Return the arguments that set what differs, in their order."""
    return [one for one in arguments if not _is_ignored(one) and _sets(one, told)]


def _sets(argument: str, told: set[str]) -> bool:
    """Whether an argument sets one of these settings, or chooses a group, which may set any."""
    name = bare_name_of(argument)
    return "." not in name or any(f"{one}.".startswith(f"{name}.") for one in told)


def _is_ignored(argument: str) -> bool:
    name = bare_name_of(argument)
    return name == LEARNING_RATE or is_ignored(name)


def _without_rate(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != LEARNING_RATE}


def _short(value: Any) -> str:
    """Return a value as the command line has it; a class without its modules."""
    if isinstance(value, str) and value.replace(".", "").replace("_", "").isalnum():
        return value.rpartition(".")[2] if not value.replace(".", "").isdecimal() else value
    return "null" if value is None else str(value)
