"""The report as a page: one file that opens without a network."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

from jinja2 import Environment

from lit_ft.comparison.columns import columns_of, learning_rate_of, with_spread
from lit_ft.comparison.comparison import Comparison
from lit_ft.comparison.facts import commands, facts
from lit_ft.comparison.noise import RULE
from lit_ft.comparison.pictures import COLOURS, Picture
from lit_ft.comparison.text import TITLE


def page(comparison: Comparison, drawn: Sequence[Picture], notes: Sequence[str] = ()) -> str:
    """Return the page.

    Args:
        comparison: What the page says.
        drawn: The pictures.
        notes: What the page says in place of pictures.
    """
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = (files("lit_ft.comparison") / "report.html.jinja").read_text(encoding="utf-8")
    columns = columns_of(comparison)
    return environment.from_string(template).render(
        title=TITLE,
        facts=list(facts(comparison)),
        warnings=comparison.warnings,
        columns=columns,
        rows=[(row, [column.cell(row) for column in columns]) for row in comparison.rows],
        rule=RULE,
        trials=[
            (row.number, learning_rate_of(trial), with_spread(trial.loss, ".4f"), len(trial.runs))
            for row in comparison.rows
            if len(row.method.trials) > 1
            for trial in row.method.trials
        ],
        without=comparison.without,
        commands=[(row, commands(row)) for row in comparison.rows],
        pictures=drawn,
        notes=notes,
        colours=COLOURS,
    )
