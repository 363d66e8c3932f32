"""Show the best ways to train a model on a card, with their commands."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table

from lit_ft.measure.cards import Card
from lit_ft.run.recommend import Recipe, command_of
from lit_ft.terminal.console import format_bytes


def shown_recipes(
    found: Sequence[Recipe], card: Card, devices: int, arguments: Sequence[str]
) -> Iterator[RenderableType]:
    """Yield a table of recipes, and the command of each.

    Args:
        found: The recipes, the best first.
        card: The card that each device is.
        devices: The number of devices.
        arguments: The arguments of the run, which the commands repeat.
    """
    name = card.name or format_bytes(card.memory_bytes)
    if not found:
        yield (
            f"Nothing fits on {devices} × {name}. Take more or larger cards, shorter rows "
            "(data.max_length) or a smaller model."
        )
        return
    table = Table(box=None, padding=(0, 2, 0, 1), header_style="dim")
    table.add_column("")
    table.add_column("method", overflow="fold")
    for heading in ("loss", "peak", "spare", "time"):
        table.add_column(heading, justify="right")
    for number, recipe in enumerate(found, 1):
        plan, outside = recipe.run.plan, recipe.run.outside
        spare = card.memory_bytes - plan.peak_bytes - outside.high
        table.add_row(
            str(number),
            " ".join(recipe.settings),
            f"{recipe.val_loss:.3f}",
            format_bytes(plan.peak_bytes),
            format_bytes(spare),
            f"{recipe.seconds:.2f} ×",
        )
    yield table
    yield (
        "The loss is that of SmolLM2-135M after 80 steps on Python's docstrings, seed 0, at the "
        "best rate of each method (benchmarks/results/quality.jsonl); below 0.005 it is noise. "
        "The time is an estimate, relative to AdamW."
    )
    for number, recipe in enumerate(found, 1):
        command = ["python", "train.py", *command_of(recipe, arguments, devices)]
        yield f"{number}  {shlex.join(command)}"
