"""Show a memory plan in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.console import RenderableType
from rich.table import Table

from lit_ft.measure.cards import Card
from lit_ft.measure.live_memory import USES
from lit_ft.measure.memory_plan import MemoryPlan
from lit_ft.run.plan_verdict import Outside, verdict
from lit_ft.terminal.console import format_bytes
from lit_ft.terminal.pairs import pairs

_SIZES = (8, 12, 16, 24, 32, 48, 80, 141)  # GiB of the cards that are common
_STYLES = {"fits": "bold green", "tight": "bold yellow", "does not fit": "bold red"}


def shown_plan(
    plan: MemoryPlan, outside: Outside, card: Card | None, facts: Mapping[str, str]
) -> Iterator[RenderableType]:
    """Yield the parts of a plan: what is planned, the peak by use, the phases, and the verdict.

    Args:
        plan: The plan of one device.
        outside: The memory that a device needs in addition to tensors.
        card: The card to hold the plan against; None names the sizes on which it fits.
        facts: What is planned, keyed by what it is about.
    """
    yield pairs(facts)
    table = Table(box=None, padding=(0, 2, 0, 1), header_style="dim")
    table.add_column("at the peak")
    table.add_column("bytes", justify="right")
    table.add_column("share", justify="right")
    held = sorted(plan.by_category.items(), key=lambda use: -use[1])
    for category, size in held:
        if size:
            share = f"{size / plan.peak_bytes:.0%}"
            table.add_row(USES[category], format_bytes(size), share)
    table.add_row("peak", format_bytes(plan.peak_bytes), plan.peak_phase, style="bold")
    yield table
    phases = ", ".join(f"{name} {format_bytes(size)}" for name, size in plan.peak_by_phase.items())
    yield pairs(
        {
            "phases": phases,
            "peak at": "\n  in ".join(plan.peak_stack),
            "in addition": f"{format_bytes(outside.low)} to {format_bytes(outside.high)}",
            "disk": _disk(plan),
        }
    )
    yield _verdict(plan, outside, card)


def _verdict(plan: MemoryPlan, outside: Outside, card: Card | None) -> str:
    if card is not None:
        found = verdict(plan, outside, card)
        spare = card.memory_bytes - plan.peak_bytes - outside.high
        name = card.name or "This size"
        told = f"{name}, {format_bytes(card.memory_bytes)}: [{_STYLES[found]}]{found}[/]"
        if found == "fits":
            return f"{told}, with {format_bytes(spare)} to spare"
        if found == "tight":
            return f"{told}: it depends on what the driver and the libraries take"
        return f"{told}: {format_bytes(plan.peak_bytes + outside.low - card.memory_bytes)} too much"
    fitting = [n for n in _SIZES if verdict(plan, outside, Card(None, n << 30)) == "fits"]
    if not fitting:
        return f"It does not fit on a card of {_SIZES[-1]} GiB"
    return f"It fits on a card of [bold]{fitting[0]} GiB[/]"


def _disk(plan: MemoryPlan) -> str:
    weights = plan.held_bytes["weights"]
    state = sum(plan.held_bytes.values())
    return f"{format_bytes(state)} a checkpoint, {format_bytes(weights)} the export"
