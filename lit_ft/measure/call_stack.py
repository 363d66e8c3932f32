"""Where in the Python code an operation is called."""

from __future__ import annotations

import inspect
from functools import cache
from pathlib import Path
from types import CodeType

Stack = tuple[tuple[CodeType, int], ...]
"""Functions and the lines in them, the innermost first."""

_MOST = 4  # functions of a stack
# What is between a model and an operation, or around both.
_OTHERS = ("torch", "lightning", "contextlib", "functools", "runpy", "__main__")
_OWN = ("lit_ft.measure", "lit_ft.run", "lit_ft.plan")


def calling_stack() -> Stack:
    """Return the functions that have called this one, without those of torch and Lightning."""
    found: list[tuple[CodeType, int]] = []
    frame = inspect.currentframe()
    while frame is not None and len(found) < _MOST:
        if _counts(frame.f_globals.get("__name__", "")):
            found.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back
    return tuple(found)


def described(stack: Stack) -> list[str]:
    """Return a stack as text, as in "LlamaMLP.forward, modeling_llama.py:155"."""
    return [f"{code.co_qualname}, {Path(code.co_filename).name}:{line}" for code, line in stack]


@cache
def _counts(module: str) -> bool:
    return module.partition(".")[0] not in _OTHERS and not module.startswith(_OWN)
