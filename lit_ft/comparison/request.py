"""What the arguments of a comparison ask for: the methods, and the folder of their runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from lit_ft.comparison.grid import Grid, grid_of, in_full, settings_in
from lit_ft.comparison.verb import settings_and_folder
from lit_ft.run.arguments import composed
from lit_ft.run.override import name_of
from lit_ft.run.sections import Compare
from lit_ft.run.trust import gives_trust
from lit_ft.run.types import allowed, as_typed

_FOLDER = Path("runs/compare")
_QUICK = {"quick=true": True, "quick=false": False}


@dataclass(frozen=True)
class Request:
    """A comparison to train.

    Attributes:
        grid: The grid of what is compared.
        folder: The folder of the runs.
    """

    grid: Grid
    folder: Path


def request_of(arguments: Sequence[str]) -> Request:
    """Return what the arguments ask for.

    Args:
        arguments: The arguments of a sweep of `train.py`, and `quick=true`, which adds the settings
            in `compare.quick`.

    Raises:
        HydraException: If an argument is not in Hydra's grammar.
        ValueError: If an argument is wrong.
    """
    quick = [one for one in arguments if name_of(one) == "quick"]
    if unknown := [one for one in quick if one not in _QUICK]:
        raise ValueError(f"{unknown[0]}: must be true or false.")
    given = [one for one in arguments if one not in quick]
    typed, folder = settings_and_folder(given, _FOLDER)
    section = _section(typed)
    if quick and _QUICK[quick[-1]]:
        if not section["quick"]:
            raise ValueError(
                "quick=true: `compare.quick` says what it adds, and is empty here. "
                "`experiment=compare_methods` has it."
            )
        typed = [*(one for text in section["quick"] for one in settings_in(text)), *typed]
        section = _section(typed)
    return Request(in_full(grid_of(typed), section), folder)


def _section(arguments: Sequence[str]) -> Mapping[str, Any]:
    """Return the settings under `compare`, which no run checks: each run has none of them."""
    section: Mapping[str, Any] = composed(grid_of(arguments).methods[0])["compare"]
    for name, type_of in get_type_hints(Compare, include_extras=True).items():
        known = allowed(type_of)
        if not known.admits(section[name]):
            raise ValueError(f"compare.{name}={as_typed(section[name])}: must be {known.text}.")
    for text in (*section["methods"], *section["quick"]):
        # They come from files, which people copy from each other.
        if gives_trust(text):
            raise ValueError(
                f"compare: {text}: only the command line may give trust, to all methods."
            )
    if not section["seeds"]:
        raise ValueError("compare.seeds is empty: give a seed, such as compare.seeds=[0].")
    return section
