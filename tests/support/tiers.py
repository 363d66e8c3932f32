"""Which tests start processes or load SmolLM2: read from their code, and watched while they run.

A test is of the `unit` tier unless it is slow, or its code or that of its fixtures leads to a
process or to SmolLM2. What code does not show (a data loader's workers, a compiler) is marked by
hand with `process` or `smollm2`; a unit test that starts a process all the same, or that opens
SmolLM2's file, fails.
"""

from __future__ import annotations

import multiprocessing.process
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from inspect import isclass, isfunction, ismodule
from types import CodeType
from typing import Any
from unittest.mock import patch

import pytest

MARKS = {"process": "starts a process", "smollm2": "loads SmolLM2"}
_STARTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn")  # events of Python's own
_watching = False


def mark_tier(item: pytest.Item) -> None:
    """Mark a test by what its code leads to, and as a unit test if that is nothing."""
    for mark in _needs(item):
        item.add_marker(mark)
    if not any(item.get_closest_marker(name) for name in ("slow", "process", "smollm2")):
        item.add_marker("unit")


def _needs(item: Any) -> set[str]:
    """Return `process` and `smollm2` where the test's code, or its fixtures', leads to them."""
    test = getattr(item.function, "hypothesis", None)
    todo = [item.function if test is None else test.inner_test]
    for definitions in item._fixtureinfo.name2fixturedefs.values():
        todo += [definition.func for definition in definitions]
    found, seen = set(), set()
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if ismodule(value) and value.__name__ in ("subprocess", "multiprocessing"):
            found.add("process")
        elif (ismodule(value) and value.__name__ == "train") or _is_packaged(value):
            found.add("smollm2")
        elif isclass(value) and value.__module__.startswith("tests."):
            todo += [member for member in vars(value).values() if isfunction(member)]
        elif isfunction(value) and value.__module__.startswith("tests."):
            todo += _named_in(value.__code__, value.__globals__)
    return found


def _named_in(code: CodeType, names: dict[str, Any]) -> Iterator[Any]:
    """Yield what a function's code means by its names: globals, and imports of its own."""
    for name in code.co_names:
        if name.startswith("tests."):
            module = vars(import_module(name))
            yield from (module[other] for other in code.co_names if other in module)
        elif name in names:
            yield names[name]
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _named_in(constant, names)


def _is_packaged(value: Any) -> bool:
    kind = value if isclass(value) else type(value)
    return (kind.__module__, kind.__qualname__) == ("lit_ft.models.sources", "Packaged")


@contextmanager
def unit_tier() -> Iterator[None]:
    """Fail the test that starts a process or opens SmolLM2's file inside the block."""
    global _watching

    def start(*_: Any) -> None:
        _fail("process")

    # Python tells nobody about processes that multiprocessing spawns.
    with patch.object(multiprocessing.process.BaseProcess, "start", start):
        _watching = True
        try:
            yield
        finally:
            _watching = False


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _watching:
        if event in _STARTS:
            _fail("process")
        if event == "open" and str(args[0]).endswith(".gguf"):
            _fail("smollm2")


def _fail(mark: str) -> None:
    pytest.fail(f"This is no unit test: it {MARKS[mark]}. Mark it with `{mark}`.")


sys.addaudithook(_audit)
