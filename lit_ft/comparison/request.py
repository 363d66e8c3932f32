"""What the arguments of a comparison ask for: the methods, and the folder of their runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lit_ft.comparison.grid import Grid, grid_of, in_full, settings_in
from lit_ft.run.arguments import CONF, composed
from lit_ft.run.command_line import understood
from lit_ft.run.override import name_of

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
    typed = understood([one for one in arguments if one not in quick], config_dir=CONF).arguments
    folders = [one.partition("=")[2] for one in typed if name_of(one) == "run_dir"]
    typed = [one for one in typed if name_of(one) != "run_dir"]
    section = composed(grid_of(typed).methods[0])["compare"]
    if quick and _QUICK[quick[-1]]:
        if not section["quick"]:
            raise ValueError(
                "quick=true: `compare.quick` says what it adds, and is empty here. "
                "`experiment=compare_methods` has it."
            )
        typed = [*(one for text in section["quick"] for one in settings_in(text)), *typed]
        section = composed(grid_of(typed).methods[0])["compare"]
    folder = Path(folders[-1]) if folders else _FOLDER
    return Request(in_full(grid_of(typed), section), folder)
