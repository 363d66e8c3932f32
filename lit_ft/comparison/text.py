"""The report as Markdown, and its table in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.console import JustifyMethod
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from lit_ft.comparison.columns import Column, columns_of
from lit_ft.comparison.comparison import Comparison
from lit_ft.comparison.facts import commands, facts
from lit_ft.comparison.noise import RULE
from lit_ft.terminal.console import console, printable

TITLE = "Comparison of runs"
_FEWEST_COLUMNS = 4  # down to the loss


def markdown(comparison: Comparison) -> str:
    """Return the report as a page of Markdown."""
    return "\n".join(_markdown(comparison)) + "\n"


def terminal_table(comparison: Comparison) -> Table:
    """Return the rows as a table for the terminal, which is narrow: the files have more."""
    columns = [one for one in columns_of(comparison) if one.in_terminal]
    # A part of a value could be taken for another value: lines break between words, and columns
    # that do not fit then are left to the files. Where a word is too long for that, it is broken.
    tables = [_table_of(comparison, columns)]
    tables += [
        _table_of(comparison, columns[:count], between="\n")
        for count in range(len(columns), _FEWEST_COLUMNS - 1, -1)
    ]
    endless = console().options.update(max_width=10_000)
    fitting = (
        table
        for table in tables
        if Measurement.get(console(), endless, table).maximum <= console().width
    )
    return next(fitting, _table_of(comparison, columns, breaks_words=True))


def _table_of(
    comparison: Comparison,
    columns: Sequence[Column],
    *,
    between: str = " ",
    breaks_words: bool = False,
) -> Table:
    """Return the table with `between` between the words of a cell."""
    table = Table(title=TITLE, title_justify="left", box=None, header_style="dim")
    for column in columns:
        justify: JustifyMethod = "left" if column.is_text else "right"
        heading = column.heading.replace(" ", "\n")
        table.add_column(heading, justify=justify, no_wrap=not breaks_words, overflow="fold")
    for row in comparison.rows:
        cells = (escape(printable(column.cell(row))) for column in columns)
        table.add_row(*(cell.replace(" ", between) for cell in cells))
    return table


def _markdown(comparison: Comparison) -> Iterator[str]:
    yield f"# {TITLE}"
    yield ""
    for what, fact in facts(comparison):
        yield f"- {what}: {_cell(fact)}"
    for warning in comparison.warnings:
        yield ""
        yield f"> **Warning:** {_cell(warning)}"
    if comparison.rows:
        columns = columns_of(comparison)
        yield ""
        yield from _table(
            [one.heading for one in columns],
            ([one.cell(row) for one in columns] for row in comparison.rows),
            columns,
        )
        yield ""
        yield RULE
    if comparison.without:
        yield ""
        yield "## Runs without a result"
        yield ""
        yield from _table(
            ["run", "status", "settings", "reason"],
            ([str(one.folder), one.status, one.name, one.reason] for one in comparison.without),
        )
    if comparison.rows:
        yield ""
        yield "## Commands"
    for row in comparison.rows:
        yield ""
        yield f"Row {row.number}:"
        yield ""
        yield "```bash"
        yield from commands(row)
        yield "```"


def _table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], columns: Sequence[Column] = ()
) -> Iterator[str]:
    yield f"| {' | '.join(headings)} |"
    right = [not column.is_text for column in columns] or [False] * len(headings)
    yield f"| {' | '.join('---:' if one else '---' for one in right)} |"
    for row in rows:
        yield f"| {' | '.join(map(_cell, row))} |"


def _cell(text: str) -> str:
    """Return a text as a cell of a table, in which nothing is markup."""
    for character in "\\`*_[]<>|":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())
