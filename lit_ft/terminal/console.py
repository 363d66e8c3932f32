"""The console that everything is printed to."""

from __future__ import annotations

from functools import cache

from rich.console import Console


@cache
def console() -> Console:
    """Return the console of this process, which prints to standard output as it is at the time."""
    return Console()


def format_duration(seconds: float) -> str:
    """Return a time in seconds as a clock shows it.

    >>> format_duration(9), format_duration(80), format_duration(3700), format_duration(90000)
    ('0:09', '1:20', '1:01:40', '25:00:00')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
