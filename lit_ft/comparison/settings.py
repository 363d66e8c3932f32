"""The settings of a run that can make a difference between runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lit_ft.run.repeats import repeated

SEED = "seed"
LEARNING_RATE = "optim.lr"

# Where a run writes, what it shows and how it was started change nothing of what it measures. What
# it is scored on changes nothing of what it learns.
# `trainer.callbacks` and `trainer.logger` list what other settings say.
_IGNORED = (
    SEED,
    "run_dir",
    "resume",
    "overwrite",
    "ui",
    "plan",
    "compare",
    "eval",
    "trusted_packages",
    "logger",
    "trainer.logger",
    "trainer.callbacks",
)


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run that can make a difference, each once, keyed by name.

    The seed is not among them, and the run's own folder has the same name in all runs.

    Args:
        config: The configuration of the run, as its summary has it.
    """
    folder = config.get("run_dir")
    found = {}
    for path, value in _leaves(config):
        name = repeated(path)
        if not is_ignored(name):
            is_inside = isinstance(folder, str) and folder and isinstance(value, str)
            found[name] = value.replace(str(folder), "RUN_DIR") if is_inside else value
    return found


def is_ignored(name: str) -> bool:
    """Whether runs that differ in this setting alone are runs of the same method."""
    return any(f"{name}.".startswith(f"{one}.") for one in _IGNORED)


def key_of(settings: Mapping[str, Any]) -> str:
    """Return a text that is the same for the same settings."""
    return json.dumps(settings, sort_keys=True, default=str)


def differing(runs: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the names of the settings that are not the same in all runs.

    >>> sorted(differing([{"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}]))
    ['b', 'c']
    """
    names = {name for settings in runs for name in settings}
    return {name for name in names if len({_text_of(one, name) for one in runs}) > 1}


def _text_of(settings: Mapping[str, Any], name: str) -> str | None:
    return key_of({name: settings[name]}) if name in settings else None


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and the value of each setting; a list of plain values is one."""
    if isinstance(node, Mapping) and node:
        for name, value in node.items():
            yield from _leaves(value, f"{path}.{name}".lstrip("."))
    elif isinstance(node, list) and any(isinstance(one, Mapping) for one in node):
        for index, value in enumerate(node):
            yield from _leaves(value, f"{path}.{index}")
    else:
        yield path, node
