"""Show a preview in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lit_ft.data.encoded import EncodedRow
from lit_ft.data.survey import Bar, Survey
from lit_ft.data.token_text import Piece, pieces
from lit_ft.run.preview import Preview, Speed
from lit_ft.run.preview_facts import facts, fate, remarks
from lit_ft.terminal.console import format_count, printable

LEARNT = "bold underline green"
CONTROL = "dim cyan"
BRACKETS = "⟦", "⟧"  # around learnt text, if the output has no styles
WIDTH = 30  # the length of the longest bar in characters


def legend(console: Console) -> Text:
    """Return a line that says how learnt text is marked."""
    if console.is_terminal:
        return Text.assemble(("Underlined, bold text", LEARNT), " is learnt; the rest is context.")
    return Text(f"Text between {BRACKETS[0]} and {BRACKETS[1]} is learnt; the rest is context.")


def shown_row(console: Console, preview: Preview, row: EncodedRow, *, with_ids: bool) -> Panel:
    """Return a panel with the text of a row and how training treats it.

    Args:
        console: The console that prints the panel.
        preview: The data that is shown, with its tokenizer.
        row: The row to show.
        with_ids: Whether the token ids follow each piece of text.
    """
    body = Text(overflow="fold")
    if row.error:
        body.append(printable(row.error), "red")
    else:
        for piece in pieces(preview.tokenizer, row.input_ids, row.labels):
            _append(body, piece, with_ids)
        if not console.is_terminal:
            body = _bracketed(preview, row, with_ids)
    for note in row.notes:
        body.append(f"\n! {note}", "yellow")
    title = f"{escape(row.origin)} · {fate(row, preview.encoder.max_length)}"
    return Panel(body, title=title, title_align="left", border_style="red" if row.error else "dim")


def _append(body: Text, piece: Piece, with_ids: bool) -> None:
    style = LEARNT if piece.is_learnt else CONTROL if piece.is_control else ""
    body.append(printable(piece.text), style)
    if with_ids:
        body.append(_ids(piece), "dim")


def _bracketed(preview: Preview, row: EncodedRow, with_ids: bool) -> Text:
    """Return the text of a row with brackets around the learnt parts."""
    body, was_learnt = Text(overflow="fold"), False
    for piece in pieces(preview.tokenizer, row.input_ids, row.labels):
        if piece.is_learnt != was_learnt:
            body.append(BRACKETS[was_learnt])
        body.append(printable(piece.text) + (_ids(piece) if with_ids else ""))
        was_learnt = piece.is_learnt
    return body.append(BRACKETS[1] * was_learnt)


def _ids(piece: Piece) -> str:
    return f"[{','.join(map(str, piece.ids))}]"


def shown_survey(preview: Preview, survey: Survey, speed: Speed | None) -> Iterable[Table | Text]:
    """Yield a source's counts, a histogram of its rows' lengths, its notes and its errors."""
    table = Table(box=None, show_header=False)
    for what, figure in facts(preview, survey, speed):
        table.add_row(Text(what, "bold"), figure)
    yield table
    max_length = preview.encoder.max_length
    bars = survey.histogram(max_length)
    if bars:
        yield Text("\nTokens per row, before rows are cut", "bold")
        yield _histogram(bars, max_length)
    for line in remarks(survey):
        yield Text(f"! {line}", "yellow")
    for error in list(_once(survey.report.errors))[:10]:
        yield Text(error, "red")


def row_and_reason(error: str) -> tuple[str, str]:
    """Return the row that an error names, and what is wrong with it."""
    row, _, reason = error.partition(": ")
    return row, reason


def _once(errors: Iterable[str]) -> Iterator[str]:
    """Yield each reason once, with the row that has it first and the number of the others."""
    rows: dict[str, list[str]] = {}
    for error in errors:
        row, reason = row_and_reason(error)
        rows.setdefault(reason, []).append(row)
    for reason, [first, *others] in rows.items():
        more = f" and {format_count(len(others), 'other row')}" if others else ""
        yield f"{first}{more}: {reason}"


def _histogram(bars: list[Bar], max_length: int) -> Table:
    table = Table(box=None, show_header=False, pad_edge=True)
    table.add_column(justify="right")
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    most, total = max(bar.num_rows for bar in bars), sum(bar.num_rows for bar in bars)
    for bar in bars:
        is_above = bar.first > max_length
        drawn = "█" * round(WIDTH * bar.num_rows / most) or ("▏" if bar.num_rows else "")
        table.add_row(
            f"{bar.first:,}-{bar.last:,}",
            Text(drawn, "red" if is_above else "green"),
            f"{bar.num_rows / total:.1%}",
            "above data.max_length" if is_above else "",
        )
    return table
