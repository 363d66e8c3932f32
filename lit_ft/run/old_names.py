"""Class names of earlier versions, which the saved configurations of older runs contain."""

from __future__ import annotations

from typing import Any

_RENAMED = {
    "lit_ft.losses.": "lit_ft.loss.",
    "lit_ft.parallel.": "lit_ft.distributed.",
}


def with_current_names(config: Any) -> Any:
    """Return a copy of a configuration in which each `_target_` has its current name."""
    if isinstance(config, dict):
        return {
            key: _current(value)
            if key == "_target_" and isinstance(value, str)
            else with_current_names(value)
            for key, value in config.items()
        }
    return [with_current_names(value) for value in config] if isinstance(config, list) else config


def _current(target: str) -> str:
    for old, new in _RENAMED.items():
        if target.startswith(old):
            return new + target.removeprefix(old)
    return target
