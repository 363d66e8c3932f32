"""A table of what works together, made by applying the rules to every combination."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lit_ft.compat.plan import Plan
from lit_ft.compat.refusal import Refusal, Remedy
from lit_ft.compat.rules import refusals

Facts = Mapping[str, Any]
"""The fields of a `Plan` that one choice sets."""


def support_table(
    optimizers: Mapping[str, Facts],
    galore: Mapping[str, Facts],
    strategies: Mapping[str, Facts],
    variations: Iterable[Facts],
) -> str:
    """Return a Markdown table of what works together, followed by its notes.

    Each column is a strategy. Each row is an optimizer with all choices of GaLore for which its
    cells are the same. "yes" means that a plain run works, and its notes say why some variations of
    that run do not. The note on a "no" says why no run works.

    Args:
        optimizers: The `Plan` fields that each choice of `optim=` sets, keyed by its name.
        galore: The `Plan` fields that each choice of `galore=` sets, keyed by its name.
        strategies: The `Plan` fields that each choice of `strategy=` sets, keyed by its name.
        variations: The `Plan` fields of each variation of a plain run, such as an adapter with
            clipping.
    """
    variations = list(variations)
    notes: dict[str, int] = {}
    lines = [
        "| `optim` | `galore` | " + " | ".join(f"`{name}`" for name in strategies) + " |",
        "| --- " * (len(strategies) + 2) + "|",
    ]
    for optim, of_optim in optimizers.items():
        alike: dict[tuple[str, ...], list[str]] = {}
        for choice, of_galore in galore.items():
            cells = tuple(
                _cell(Plan(**{**of_optim, **of_galore, **of_strategy}), variations, notes, choice)
                for of_strategy in strategies.values()
            )
            alike.setdefault(cells, []).append(f"`{choice}`")
        lines += [
            f"| `{optim}` | {', '.join(choices)} | {' | '.join(cells)} |"
            for cells, choices in alike.items()
        ]
    lines.append("")
    lines += [f"{number}. {message}" for message, number in notes.items()]
    return "\n".join(lines) + "\n"


def first_reason(plan: Plan, galore: str | None = None) -> str | None:
    """Return the first reason why a plan cannot work, worded for the command line; None if it can.

    Args:
        plan: The plan to check.
        galore: The choice of `galore=` that the caller already names, so that remedies need not
            repeat it; None if it names no choice.
    """
    for refusal in refusals(plan):
        ways = [_without_galore(remedy, galore) for remedy in refusal.remedies]
        return Refusal(refusal.why, *ways).on_command_line
    return None


def _without_galore(remedy: Remedy, galore: str | None) -> Remedy:
    if len(remedy.settings) < 2 or remedy.settings.get("galore") != galore:
        return remedy
    return replace(remedy, settings={k: v for k, v in remedy.settings.items() if k != "galore"})


def _cell(plain: Plan, variations: Sequence[Facts], notes: dict[str, int], galore: str) -> str:
    reason = first_reason(plain, galore)
    reasons = (
        [reason] if reason else [first_reason(replace(plain, **v), galore) for v in variations]
    )
    numbers = {notes.setdefault(said, len(notes) + 1) for said in reasons if said is not None}
    marks = f" <sup>{', '.join(map(str, sorted(numbers)))}</sup>" if numbers else ""
    return f"{'no' if reason else 'yes'}{marks}"
