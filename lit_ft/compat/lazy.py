"""Import the names of a package when they are first used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def on_demand(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a `__getattr__` with which a package imports its names on demand (PEP 562).

    A program that needs one name does not wait for the imports of the others, which take seconds.

    Args:
        package: The full name of the package.
        modules: The full name of the module that defines each name, keyed by name.
    """

    def __getattr__(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(modules[name]), name)

    return __getattr__
