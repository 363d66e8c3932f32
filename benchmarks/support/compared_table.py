"""The tables of methods in README.md and in the docs, made from the report of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from support.results import ROOT

PAGES = (ROOT / "README.md", ROOT / "docs" / "which-method.md")
DEFAULT = "optim=galore_subspace"
_BEGIN, _END = "<!-- compared: begin -->\n", "<!-- compared: end -->\n"
_OF_8B = "An 8B, planned"
_GIB = 2**30

Row = Mapping[str, Any]


def with_tables(page: str, report: Mapping[str, Any], planned: Mapping[str, int]) -> str:
    """Return the text of a page with the table in place of an earlier one.

    Args:
        page: The text, with the two marks between which the table stands.
        report: The `report.json` of the comparison.
        planned: The planned peak bytes of an 8B model, keyed by method.
    """
    before, rest = page.split(_BEGIN)
    table = "".join(f"{line}\n" for line in _lines(report, planned))
    return before + _BEGIN + table + _END + rest.split(_END)[1]


def _lines(report: Mapping[str, Any], planned: Mapping[str, int]) -> Iterator[str]:
    yield f"| {' | '.join((*_COLUMNS, _OF_8B))} |"
    yield "| --- |" + " --- |" * len(_COLUMNS)
    for row in report["rows"]:
        large = f"{planned[row['settings']] / _GIB:.1f} GiB"
        yield f"| {' | '.join((*(cell(row) for cell in _COLUMNS.values()), large))} |"


def _name(row: Row) -> str:
    name = " ".join(f"`{one}`" for one in row["settings"].split())
    return f"no arguments ({name})" if row["settings"] == DEFAULT else name


def _rate(row: Row) -> str:
    rate = _best(row)["learning_rate"]
    return "its own" if rate is None else f"{rate:g}"


def _loss(row: Row) -> str:
    best = _best(row)
    if best["val_loss_deviation"] is None:
        return f"{best['val_loss']:.3f}"
    return f"{best['val_loss']:.3f} ± {best['val_loss_deviation']:.3f}"


def _size(name: str) -> Callable[[Row], str]:
    return lambda row: f"{_best(row)[name] / _GIB:.2f} GiB"


def _best(row: Row) -> Mapping[str, Any]:
    found: Mapping[str, Any] = row["trials"][0]
    return found


_COLUMNS: Mapping[str, Callable[[Row], str]] = {
    "`python train.py` with": _name,
    "Learning rate": _rate,
    "Validation loss": _loss,
    "Share of fall": lambda row: f"{row['share_of_fall']:.1%}",
    "Peak memory": _size("peak_bytes"),
    "Optimizer state": _size("optimizer_state_bytes"),
    "Tokens/s": lambda row: f"{_best(row)['tokens_per_second']:.0f}",
}
