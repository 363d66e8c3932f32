"""Describe the rows of a preview in sentences and in lines of a table."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

from lit_ft.data import notes
from lit_ft.data.encoded import EncodedRow
from lit_ft.data.survey import Survey, filled_by_batching, filled_by_packing
from lit_ft.run.preview import Preview, Speed
from lit_ft.terminal.console import format_count


def fate(row: EncodedRow, max_length: int) -> str:
    """Return a line that says how training treats a row."""
    if row.error:
        return "bad: training cannot use it"
    if row.overlong:
        return f"left out: {row.row_tokens:,} tokens, more than data.max_length={max_length:,}"
    counts = f"{format_count(row.num_tokens, 'token')}, {row.num_targets:,} learnt"
    if row.truncated:
        counts += f"; {row.row_tokens - row.num_tokens:,} more tokens are cut off"
    return counts if row.num_targets else f"left out: {counts}"


def facts(preview: Preview, survey: Survey, speed: Speed | None) -> Iterator[tuple[str, str]]:
    """Yield the lines of the table about a source, each as a label and a figure."""
    report = survey.report
    of = "" if survey.total_rows in (None, survey.num_rows) else f" of {survey.total_rows:,}"
    more = " (there are more)" if survey.total_rows is None else ""
    yield "rows read", f"{survey.num_rows:,}{of}{more}"
    learnt = report.targets / report.tokens if report.tokens else 0
    yield "examples", f"{report.examples:,}"
    yield "tokens", f"{report.tokens:,}; {report.targets:,} are learnt ({learnt:.0%})"
    max_length = preview.encoder.max_length
    above = survey.share_above(max_length)
    yield f"longer than data.max_length={max_length:,}", f"{above:.1%} of the rows"
    for count, what in (
        (report.truncated, "cut"),
        (report.dropped_overlong, "left out: too long"),
        (report.dropped_without_targets, "left out: nothing to learn"),
        (report.skipped, "bad"),
    ):
        if count:
            yield what, f"{count:,}"
    if report.examples:
        yield from _batches(preview, survey, speed)


def _batches(preview: Preview, survey: Survey, speed: Speed | None) -> Iterator[tuple[str, str]]:
    settings = preview.settings
    packing, rows = settings["packing"], settings["batch_size"]
    unpacked = filled_by_batching(
        survey.num_tokens,
        batch_size=rows,
        micro_batches=preview.micro_batches,
        group_by_length=settings["group_by_length"],
    )
    packed = filled_by_packing(survey.num_tokens, preview.encoder.max_length)
    chosen = ("", " (current setting)") if packing else (" (current setting)", "")
    yield f"padding with data.batch_size={rows:,}", f"{1 - unpacked:.1%} of a batch{chosen[0]}"
    yield "padding with data.packing=true", f"{1 - packed:.1%} of a row{chosen[1]}"
    whole = survey.scale
    tokens = survey.report.tokens * (whole or 1)
    about = "about " if (whole or 1) > 1 else ""
    what = "an epoch" if whole else format_count(survey.num_rows, "row")
    if speed is None:
        yield what, f"{about}{tokens:,.0f} tokens; no run of this model has measured its speed yet"
        return
    time = timedelta(seconds=round(tokens / speed.tokens_per_second))
    per_second = f"{speed.tokens_per_second:,.0f} tokens/s, the speed of {speed.run_dir}"
    yield what, f"{about}{tokens:,.0f} tokens: {time} at {per_second}"


def remarks(survey: Survey) -> list[str]:
    """Return the notes about the rows, each with the number of rows that it is about."""
    return list(notes.lines(survey.report.notes))
