"""Show the best ways to train a model on a card, with their commands."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table

from lit_ft.run.recommend import Advice, Recipe, command_of
from lit_ft.terminal.console import format_bytes

_MEASURED = (
    "The loss is that of SmolLM2-135M after 80 steps on Python's docstrings, seed 0, at the "
    "best rate of each method (benchmarks/results/quality.jsonl); a difference below "
    "0.005 is noise, and - means not measured. "
    "The time is an estimate, relative to AdamW."
)


def shown_advice(given: Sequence[Advice]) -> Iterator[RenderableType]:
    """Yield a table of the best recipes for a card, or of the best one for each of several cards.

    The commands follow.

    Args:
        given: The advice for each card.
    """
    rows = list(_rows(given))
    if rows:
        yield _table(rows, heading="card" if len(given) > 1 else "")
        yield _MEASURED
    for name, one, recipe in rows:
        command = ["python", "train.py", *command_of(recipe, one.arguments, one.devices)]
        yield f"{name}  {shlex.join(command)}"
    if without := [_name(one) for one in given if not one.recipes]:
        yield (
            f"Nothing fits on {' or '.join(without)}. Take more or larger cards, shorter rows "
            "(data.max_length) or a smaller model."
        )


def _rows(given: Sequence[Advice]) -> Iterator[tuple[str, Advice, Recipe]]:
    """Yield what is shown, each under its number or its card."""
    if len(given) == 1:
        [one] = given
        yield from ((str(number), one, recipe) for number, recipe in enumerate(one.recipes, 1))
    else:
        yield from ((_name(one), one, one.recipes[0]) for one in given if one.recipes)


def _name(advice: Advice) -> str:
    name = advice.card.name or f"{advice.card.memory_bytes / 2**30:g} GiB"
    # As narrow as can be, for a terminal of 80 columns.
    return f"{advice.devices}×{name}" if advice.devices > 1 else name


def _table(rows: Sequence[tuple[str, Advice, Recipe]], *, heading: str) -> Table:
    # Narrow enough that a terminal of 80 columns holds the longest setting in one line.
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column(heading)
    table.add_column("method", overflow="fold")
    for heading in ("loss", "peak", "spare", "time"):
        table.add_column(heading, justify="right")
    for name, advice, recipe in rows:
        plan, outside = recipe.run.plan, recipe.run.outside
        table.add_row(
            name,
            " ".join(recipe.settings),
            "-" if recipe.val_loss is None else f"{recipe.val_loss:.3f}",
            format_bytes(plan.peak_bytes),
            format_bytes(advice.card.memory_bytes - plan.peak_bytes - outside.high),
            f"{recipe.seconds:.2f} ×",
        )
    return table
