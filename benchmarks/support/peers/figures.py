"""What the records of peers.py come to: each row's figures, and whether ours is ahead."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from support.best_rate import best_rate
from support.peers.rows import PEERS, ROWS, TRAINED

Record = Mapping[str, Any]

SAME = "the same weights"


@dataclass(frozen=True)
class Summary:
    """The figures of a row at its best rate.

    Args:
        title: The row's name for people.
        rate: The best of the rates that ran; None if none ran.
        rates: The rates that ran.
        losses: The held-out loss of each seed.
        peak_bytes: The most bytes of torch's allocator from the first step to the last.
        rss_growth_bytes: How far the process's resident memory has grown in this time.
        tokens_per_second: The median of steps in turn with others.
        resumes: What became of the weights of a stopped run that went on.
        error: The first error of a run; None if none failed.
        notes: What else a reader must know.
    """

    title: str
    rate: float | None
    rates: tuple[float, ...]
    losses: Mapping[int, float]
    peak_bytes: float | None
    rss_growth_bytes: float | None
    tokens_per_second: float | None
    resumes: str | None
    error: str | None
    notes: tuple[str, ...]

    @property
    def loss(self) -> float | None:
        """The mean over the seeds."""
        return statistics.mean(self.losses.values()) if self.losses else None

    @property
    def at_edge(self) -> bool:
        """Whether a rate beyond those that ran may be better."""
        return len(self.rates) > 1 and self.rate in (min(self.rates), max(self.rates))


def key_of(record: Record) -> tuple[Any, ...]:
    """Return what tells a run from the others with the same settings."""
    names = {"train": ("row", "lr", "seed"), "speed": ("peer", "ours", "round"), "resume": ("row",)}
    return record["kind"], *(record[name] for name in names[record["kind"]])


def latest(records: Iterable[Record]) -> list[Record]:
    """Return the last record of each run: one that failed may have run again."""
    return list({key_of(record): record for record in records}.values())


def best_rate_of(records: Iterable[Record], row: str) -> float | None:
    """Return the rate with the lowest held-out loss; None if no run has ended."""
    losses: dict[float, list[float]] = {}
    for record in records:
        if (record["kind"], record.get("row")) == ("train", row) and "error" not in record:
            losses.setdefault(record["lr"], []).append(_finite(record["held_out_loss"]))
    return best_rate(losses)


def summary(records: Sequence[Record], row: str) -> Summary:
    """Return the figures of a row."""
    trained = [r for r in records if (r["kind"], r.get("row")) == ("train", row)]
    ended = [record for record in trained if "error" not in record]
    rate = best_rate_of(records, row)
    best = [record for record in ended if record["lr"] == rate]
    [resume] = [r for r in records if (r["kind"], r.get("row")) == ("resume", row)][-1:] or [None]
    return Summary(
        title=ROWS[row].title,
        rate=rate,
        rates=tuple(sorted({record["lr"] for record in ended})),
        losses={record["seed"]: _finite(record["held_out_loss"]) for record in best},
        peak_bytes=_median(record.get("peak_bytes") for record in best),
        rss_growth_bytes=_median(record.get("rss_growth_bytes") for record in best),
        tokens_per_second=_speed(records, row),
        resumes=None if resume is None else _resumes(resume),
        error=next((record["error"] for record in trained if "error" in record), None),
        notes=tuple(_notes(row, best, resume)),
    )


def _speed(records: Iterable[Record], row: str) -> float | None:
    in_turn = [r["tokens_per_second"] for r in records if r["kind"] == "speed" and "error" not in r]
    return _median(speeds[row]["median"] for speeds in in_turn if row in speeds)


def _resumes(record: Record) -> str:
    if "error" in record:
        return "fails"
    apart = record["largest_difference"]
    return SAME if apart == 0 else f"other weights, up to {_finite(apart):.0e} apart"


def _notes(row: str, best: Sequence[Record], resume: Record | None) -> Iterable[str]:
    if best and ROWS[row].note:
        yield ROWS[row].note
    if best and best[0].get("step_seconds"):
        first, usual = best[0]["first_step_seconds"], best[0]["step_seconds"]["median"]
        if first > 3 * usual:
            yield f"Its first step takes {first:.1f} s, the others {usual:.1f} s."
        if best[0]["rate_at_end"] > 0.5 * best[0]["lr"]:
            yield "The schedule does not reach its weights: their rate stays the same."
    if resume is not None and "error" in resume:
        yield f"Resuming fails: {resume['error']}"
    if resume is not None and resume.get("note"):
        yield f"It {resume['note']}."


class Verdict(NamedTuple):
    """A peer and ours in one column.

    Args:
        peer: The peer's row.
        ours: Our row.
        column: What is compared.
        theirs_shown: The peer's figure.
        ours_shown: Our figure.
        word: `ahead`, `level` or `behind`, which tells where ours is.
    """

    peer: str
    ours: str
    column: str
    theirs_shown: str
    ours_shown: str
    word: str


class Column(NamedTuple):
    """A column in which less is better.

    Args:
        name: The column's name.
        value: Reads the figure.
        shown: Writes the figure.
        level: How far two figures may be apart, as a share of the peer's, and still be level.
    """

    name: str
    value: Callable[[Summary], float | None]
    shown: Callable[[float], str]
    level: float


def mebibytes(value: float) -> str:
    """Return bytes as MiB."""
    return f"{value / 2**20:,.0f} MiB"


LESS_IS_BETTER = (
    Column("held-out loss", lambda row: row.loss, "{:.4f}".format, 0.001),
    Column("peak", lambda row: row.peak_bytes, mebibytes, 0.01),
    Column("growth of the process", lambda row: row.rss_growth_bytes, mebibytes, 0.05),
)


def verdicts(records: Sequence[Record]) -> list[Verdict]:
    """Compare each peer with the row of ours that is closest to it, column by column."""
    rows = {row: summary(records, row) for row in TRAINED}
    found = []
    for peer, row in PEERS.items():
        ours = row.against[0]
        pair = _of_the_same_seeds(rows[peer], rows[ours])
        for column in LESS_IS_BETTER:
            theirs, our = map(column.value, pair)
            if theirs is not None and our is not None:
                word = _word(our, theirs, column.level)
                shown = (column.shown(theirs), column.shown(our))
                found.append(Verdict(peer, ours, column.name, *shown, word))
        found += _of_speed(records, peer, ours)
        theirs_resumed, ours_resumed = rows[peer].resumes, rows[ours].resumes
        if theirs_resumed is not None and ours_resumed is not None:
            word = _of_two(ours_resumed == SAME, theirs_resumed == SAME)
            found.append(Verdict(peer, ours, "resumes", theirs_resumed, ours_resumed, word))
    return found


def _of_the_same_seeds(peer: Summary, ours: Summary) -> tuple[Summary, Summary]:
    """Return both with the losses of the seeds that both have: seeds differ more than rows."""
    seeds = peer.losses.keys() & ours.losses.keys()
    alike = [{seed: row.losses[seed] for seed in sorted(seeds)} for row in (peer, ours)]
    return replace(peer, losses=alike[0]), replace(ours, losses=alike[1])


def _of_speed(records: Sequence[Record], peer: str, ours: str) -> Iterable[Verdict]:
    pairs = [r for r in records if r["kind"] == "speed" and (r["peer"], r["ours"]) == (peer, ours)]
    pairs = [record for record in pairs if "error" not in record]
    if not pairs:
        return
    shown = []
    for row in (peer, ours):
        medians = [record["tokens_per_second"][row]["median"] for record in pairs]
        shown.append(f"{statistics.median(medians):.0f} tokens/s")
    ratios = [record["times_as_fast"]["median"] for record in pairs]
    # Where the rounds do not agree on who is faster, the difference means nothing.
    word = "level" if min(ratios) <= 1.0 <= max(ratios) else _word(1.0, ratios[0], 0.0)
    yield Verdict(peer, ours, "tokens/s", *shown, word)


def _of_two(ours: bool, theirs: bool) -> str:
    return "level" if ours == theirs else ("ahead" if ours else "behind")


def _word(ours: float, theirs: float, level: float) -> str:
    """Return where ours is if less is better; a growth can be 0, and a loss infinite."""
    if ours == theirs or abs(ours - theirs) <= level * abs(theirs) < math.inf:
        return "level"
    return "ahead" if ours < theirs else "behind"


def check_same_batches(records: Iterable[Record]) -> None:
    """Fail unless all rows with one seed have trained on the same batches."""
    batches: dict[int, str] = {}
    for record in records:
        if record.get("batches"):
            first = batches.setdefault(record["seed"], record["batches"])
            if record["batches"] != first:
                raise ValueError(f"{record['row']} has trained on other batches than the rest")


def _median(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return statistics.median(found) if found else None


def _finite(value: float | None) -> float:
    return math.inf if value is None else value  # NaN and infinity are written as null
