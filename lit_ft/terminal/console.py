"""The console that everything is printed to."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

from rich.console import Console

from lit_ft.terminal.held_signals import held_signals


class _Holds(threading.local):
    def __init__(self) -> None:
        self.stack: list[AbstractContextManager[None]] = []


class _Console(Console):
    """A console that no signal interrupts between the start of a text and its last byte."""

    _holds = _Holds()

    def __enter__(self) -> Console:
        hold = held_signals()
        hold.__enter__()
        self._holds.stack.append(hold)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)
        finally:
            self._holds.stack.pop().__exit__(None, None, None)


@cache
def console() -> Console:
    """Return the console of this process, which prints to standard output as it is at the time."""
    return _Console()


def separator() -> str:
    """Return what stands between two facts, in characters that the terminal or file can hold."""
    return " | " if console().options.ascii_only else " · "


def printable(text: str) -> str:
    r"""Return a text in which codes that would steer the terminal are shown instead of sent.

    >>> print(printable("red: \x1b[31m"))
    red: \x1b[31m
    """
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def format_duration(seconds: float) -> str:
    """Return a time in seconds as a clock shows it.

    >>> format_duration(9), format_duration(80), format_duration(3700), format_duration(90000)
    ('0:09', '1:20', '1:01:40', '25:00:00')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_count(number: int, noun: str) -> str:
    """Return a number and what it counts, as in "1 row" and "5,423 rows".

    >>> format_count(1, "row"), format_count(5423, "row")
    ('1 row', '5,423 rows')
    """
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def format_bytes(nbytes: float) -> str:
    """Return a number of bytes in the unit that suits it.

    >>> format_bytes(264), format_bytes(63_000), format_bytes(538_000_000), format_bytes(3 << 30)
    ('264 B', '62 KiB', '513 MiB', '3.00 GiB')
    """
    for exponent, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if nbytes >= 1 << exponent:
            return f"{nbytes / (1 << exponent):{'.2f' if unit == 'GiB' else '.0f'}} {unit}"
    return f"{nbytes:.0f} B"
