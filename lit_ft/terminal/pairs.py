"""Facts as a table of two columns."""

from __future__ import annotations

from collections.abc import Mapping

from rich.markup import escape
from rich.table import Table

from lit_ft.terminal.console import printable


def pairs(rows: Mapping[str, str]) -> Table:
    """Return a table without a frame, with a row for each fact.

    Args:
        rows: The facts, keyed by what they are about. Codes in them do not steer the terminal.
    """
    table = Table(box=None, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(escape(name), escape(printable(value)))
    return table
