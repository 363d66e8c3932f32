"""The figures of peers.py for people: a table, and where ours is not ahead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from support.peers.figures import (
    Record,
    Summary,
    Verdict,
    check_same_batches,
    mebibytes,
    summary,
    verdicts,
)
from support.peers.reasons import REASONS
from support.peers.rows import ROWS, UNTRAINED

HEADINGS = (
    "Row",
    "Rate (of tried)",
    "Held-out loss",
    "Peak",
    "Growth of the process",
    "Tokens/s",
    "Resumes to",
)


def cells(row: Summary) -> list[str]:
    """Return the cells of a row."""
    rate = "" if row.rate is None else f"{row.rate:g} ({len(row.rates)}){'*' * row.at_edge}"
    if row.title == ROWS[UNTRAINED].title:
        rate = ""
    if not row.losses:
        rate = "fails" if row.error else ""
    return [
        row.title,
        rate,
        _loss(row),
        "" if row.peak_bytes is None else mebibytes(row.peak_bytes),
        "" if row.rss_growth_bytes is None else mebibytes(row.rss_growth_bytes),
        "" if row.tokens_per_second is None else f"{row.tokens_per_second:.0f}",
        row.resumes or "",
    ]


def _loss(row: Summary) -> str:
    if row.loss is None:
        return ""
    spread = max(row.losses.values()) - min(row.losses.values())
    return f"{row.loss:.4f}" + (f" (seeds differ by {spread:.3f})" if spread else "")


def table(records: Sequence[Record]) -> list[list[str]]:
    """Return the rows that have any figure."""
    rows = [summary(records, row) for row in ROWS]
    return [cells(row) for row in rows if row.losses or row.error or row.resumes]


def index_figures(records: Sequence[Record]) -> list[str]:
    """Return the figures for the index of benchmarks."""
    words = Counter(verdict.word for verdict in verdicts(records))
    return [f"{words['ahead']} of {words.total()}", f"level in {words['level']}"]


def as_markdown(records: Sequence[Record], settings: Mapping[str, Any]) -> str:
    """Return the page.

    Raises:
        ValueError: If rows have trained on different batches.
    """
    check_same_batches(records)
    compared = verdicts(records)
    return "\n".join(
        [
            "# lit_ft against its peers",
            "",
            *_introduction(settings),
            "",
            *(f"| {' | '.join(row)} |" for row in (HEADINGS, ["---"] + ["---:"] * 5 + ["---"])),
            *(f"| {' | '.join(row)} |" for row in table(records)),
            "",
            *_notes(records),
            "",
            "## Where lit_ft is not ahead",
            "",
            *_standing(records),
            "",
            *(_line(verdict) for verdict in compared if verdict.word != "ahead"),
            "",
            *_origin(records),
            "",
        ]
    )


def _introduction(settings: Mapping[str, Any]) -> list[str]:
    return [
        f"Each row fine-tunes {settings['model']} in float32 in a process of its own, for "
        f"{settings['steps']} steps of {settings['batch_size']} rows of the embedded data. All "
        "see the same batches in the same order, and the same schedule. Gradients are clipped to a "
        "norm of 1 where the row can. Each row has its best learning rate of those that were "
        "tried; * marks a rate at the edge of them. One function measures the held-out loss of "
        "all.",
        "",
        "*Peak* is the most memory that torch's CPU allocator had in use from the first step to "
        "the last, weights included. *Growth of the process* is how far its resident memory has "
        "grown in this time. *Tokens/s* is the median of steps without the first three, padding "
        "not counted, where each peer takes turns with lit_ft step by step. *Resumes to* compares "
        "a tiny random model that stops halfway, and goes on in a new process from what the row "
        "itself has saved, with one that never stops.",
    ]


def _notes(records: Sequence[Record]) -> Iterable[str]:
    for row in ROWS:
        found = summary(records, row)
        notes = [f"A run fails: {found.error}"] if found.error else []
        notes += found.notes
        if notes:
            yield f"- {found.title}: {' '.join(notes)}"


def _standing(records: Sequence[Record]) -> list[str]:
    ahead, level = index_figures(records)
    return [
        f"Each peer is held against the row of lit_ft that is closest to it. lit_ft is ahead in "
        f"{ahead} comparisons and {level}. Two figures are level if they differ by less than 0.1 % "
        "(loss), 1 % (peak) or 5 % (growth), or if the rounds do not agree on who is faster. "
        "Losses are compared on the seeds that both have.",
    ]


def _line(verdict: Verdict) -> str:
    unknown = "No reason is known yet." if verdict.word == "behind" else ""
    reason = REASONS.get((verdict.peer, verdict.column), unknown)
    titles = ROWS[verdict.peer].title, ROWS[verdict.ours].title
    return (
        f"- {titles[0]}, {verdict.column}: {verdict.word}, {verdict.ours_shown} ({titles[1]}) "
        f"against {verdict.theirs_shown}. {reason}"
    ).rstrip()


def _origin(records: Sequence[Record]) -> Iterable[str]:
    """Tell hardware, versions, dates and commands, each once."""
    cpus = {f"{r['hardware']['cpu']}, {r['threads']} threads" for r in records}
    yield f"- Hardware: {'; '.join(sorted(cpus))}"
    versions = {f"{name} {v}" for r in records for name, v in r.get("versions", {}).items()}
    yield f"- Versions: {', '.join(sorted(versions))}"
    dates = sorted({record["date"] for record in records})
    yield f"- Dates: {dates[0]} to {dates[-1]}"
    yield f"- Commits: {', '.join(sorted({str(record['commit'])[:12] for record in records}))}"
    for command in sorted({record["command"] for record in records}):
        yield f"- Command: `{command}`"
