"""Let the messages and progress bars of libraries appear on the display of this process."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partialmethod
from typing import Any

from rich.text import Text
from tqdm import tqdm

from lit_ft.terminal.console import console
from lit_ft.terminal.display import display


@cache
def adopt_bars() -> None:
    """Show the bars of tqdm, with which most libraries show progress, as details of a stage."""
    # tqdm has no other way to change the default of an argument for all libraries.
    arguments = {"file": _Bars(), "leave": False, "bar_format": "{desc}: {n_fmt}/{total_fmt}{unit}"}
    tqdm.__init__ = partialmethod(tqdm.__init__, **arguments)


@contextmanager
def own_bars_only() -> Iterator[None]:
    """Show the bars of tqdm in this block as details of a stage, or not at all."""
    usual = tqdm.__init__

    def hidden(bar: Any, *args: Any, **options: Any) -> None:
        usual(bar, *args, **{**options, "disable": True})

    if not adopt_bars.cache_info().currsize:
        tqdm.__init__ = hidden
    try:
        yield
    finally:
        tqdm.__init__ = usual


def adopt_logs() -> None:
    """Let loggers write to standard error as it is at the time, and not break its words.

    A logger that libraries make keeps the standard error of the time when they are imported.
    """
    for logger in list(logging.root.manager.loggerDict.values()):
        for handler in getattr(logger, "handlers", []):
            if type(handler) is logging.StreamHandler:
                # Not `setStream`, which first flushes the old stream: it may be closed.
                handler.stream = _StandardError()


class _Bars:
    """The file to which tqdm writes."""

    def write(self, text: str) -> int:
        display().detail(" ".join(text.split()).replace("/?", "").lstrip(": "))
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True  # libraries disable a bar that is written to a file


class _StandardError:
    """Standard error as it is at the time, with lines that end between words in a terminal."""

    def write(self, text: str) -> int:
        written: int = sys.stderr.write(_wrapped(text) if sys.stderr.isatty() else text)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


def _wrapped(text: str) -> str:
    lines = Text(text.removesuffix("\n")).wrap(console(), console().width)
    return "\n".join(line.plain.rstrip() for line in lines) + "\n" * text.endswith("\n")
