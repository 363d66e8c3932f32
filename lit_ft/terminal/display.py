"""The display of this process, which a program chooses and every room may use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager


class Display:
    """Shows nothing, as a library should."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Show in this block what is being done.

        Args:
            name: What is being done, such as "loading the model".
        """
        yield

    def detail(self, text: str) -> None:
        """Show how far the innermost stage is.

        Args:
            text: How far it is, such as "120/500 rows"; an empty text shows nothing more.
        """

    def progress(self, facts: Sequence[str]) -> None:
        """Show how far the program is, while it is in no stage.

        Args:
            facts: The facts, the most important one first; none removes them.
        """

    def close(self) -> None:
        """Leave the terminal as it was, before the process ends without Python's own clean-up."""


_display = Display()


def display() -> Display:
    """Return the display of this process, which shows nothing unless a program has chosen one."""
    return _display


def set_display(chosen: Display) -> None:
    """Show on `chosen` from now on."""
    global _display
    _display = chosen


def stage(name: str) -> AbstractContextManager[None]:
    """Show in a `with` block what is being done, such as "loading the model"."""
    return _display.stage(name)
