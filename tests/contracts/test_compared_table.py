"""The tables that benchmarks/compare_methods.py writes into README.md and the docs."""

from __future__ import annotations

from typing import Any

import pytest
from support.compared_table import PAGES, with_tables


def row(settings: str, share: float, **figures: Any) -> dict[str, Any]:
    usual = {
        "learning_rate": 1e-4,
        "val_loss": 2.5,
        "val_loss_deviation": None,
        "peak_bytes": 3 * 2**30,
        "optimizer_state_bytes": 2**29,
        "tokens_per_second": 123.4,
    }
    trials = [{**usual, **figures}, {**usual, "val_loss": 9.0}]  # the other rates come behind
    return {"settings": settings, "share_of_fall": share, "trials": trials}


REPORT = {
    "rows": [
        row("optim=adamw update=whole", 1.0, val_loss=2.4, val_loss_deviation=0.0123),
        row("optim=galore_subspace", 0.987, learning_rate=None),
    ]
}
PLANNED = {"optim=adamw update=whole": 90 * 2**30, "optim=galore_subspace": 17 * 2**30}


def test_a_report_becomes_a_table() -> None:
    page = "before\n<!-- compared: begin -->\n| old |\n<!-- compared: end -->\nafter\n"
    made = with_tables(page, REPORT, PLANNED)
    before, *lines, after = made.splitlines()
    assert (before, after) == ("before", "after")
    assert lines[3:5] == [
        "| `optim=adamw` `update=whole` | 0.0001 | 2.400 ± 0.012 | 100.0% | 3.00 GiB | 0.50 GiB "
        "| 123 | 90.0 GiB |",
        "| no arguments (`optim=galore_subspace`) | its own | 2.500 | 98.7% | 3.00 GiB | 0.50 GiB "
        "| 123 | 17.0 GiB |",
    ]
    assert with_tables(made, REPORT, PLANNED) == made


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_page_has_one_place_for_it(page: Any) -> None:
    text = page.read_text(encoding="utf-8")
    made = with_tables(text, REPORT, PLANNED)
    assert "98.7%" in made and made.splitlines()[0] == text.splitlines()[0]
