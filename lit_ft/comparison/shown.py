"""What a person sees while runs train, and of what came of them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Event
from typing import Any

from lit_ft.comparison.cells import Cell
from lit_ft.comparison.comparison import Comparison
from lit_ft.comparison.pictures import MISSING, can_draw
from lit_ft.comparison.text import terminal_table
from lit_ft.terminal import display
from lit_ft.terminal.console import console, format_duration, printable


def say(text: str) -> None:
    """Print a line."""
    console().print(printable(text), markup=False, highlight=False, soft_wrap=True)


class ShownRuns:
    """Trains runs, and shows which ones they are and what came of each.

    Args:
        about: The number of runs, as far as it is known.
    """

    def __init__(self, about: int) -> None:
        self._about = about
        self._begun = 0
        self._running: list[str] = []

    def train(
        self, cell: Cell, environment: Mapping[str, str], stopped: Event
    ) -> Mapping[str, Any]:
        """Train a run, and print its result."""
        self._begun += 1
        self._running.append(cell.name)
        self._show()
        if not console().is_terminal:
            say(f"{self._number()}: {cell.name}")
        began = time.monotonic()
        try:
            summary = cell.run(environment, stopped)
        finally:
            self._running.remove(cell.name)
            self._show()
        loss = summary.get("val_loss")
        result = summary["ended"] if loss is None else f"held-out loss {loss:.4f}"
        say(f"{cell.name}: {result}  {format_duration(time.monotonic() - began)}")
        return summary

    def _show(self) -> None:
        others = f" and {len(self._running) - 1} more" if len(self._running) > 1 else ""
        display().detail(f"{self._number()}: {''.join(self._running[-1:])}{others}")

    def _number(self) -> str:
        return f"run {self._begun} of about {max(self._begun, self._about)}"


def show(comparison: Comparison, files: Sequence[Path]) -> None:
    """Print the table of a comparison, what is to be known about it, and its files."""
    if comparison.rows:
        console().print(terminal_table(comparison))
    for one in comparison.without:
        if one.run is None or not one.run.is_pruned:  # the table counts their rates
            say(f"{one.folder}: {one.status}: {one.reason}")
    for warning in comparison.warnings:
        say(f"Warning: {warning}")
    if not can_draw():
        say(MISSING)
    for file in files:
        say(str(file))
