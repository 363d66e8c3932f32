"""The methods that a comparison is asked for: each choice of each setting that is swept."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from lit_ft.comparison.settings import LEARNING_RATE, SEED
from lit_ft.run.override import name_of

T = TypeVar("T")


@dataclass(frozen=True)
class Grid:
    """What is compared.

    Attributes:
        methods: The arguments of each method, without its learning rate and its seed.
        swept: The names of the settings in which the methods differ.
        rates: The learning rates to try with every method; empty to find rates for each.
        seeds: The seeds. The first one finds the learning rate; empty for those of `compare.seeds`.
        tune: Whether to find rates; otherwise each method trains at that of its own choice.
    """

    methods: tuple[tuple[str, ...], ...]
    swept: frozenset[str]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    tune: bool = True


def in_full(grid: Grid, section: Mapping[str, Any]) -> Grid:
    """Return the grid with what the settings under `compare` say.

    Args:
        grid: The grid of the arguments. Each of its methods is taken with each of the section's.
        section: The settings.

    Raises:
        ValueError: If a method holds a quotation mark that does not end.
    """
    listed = [settings_in(text) for text in section["methods"]] or [()]
    one_alone = ("compare.methods=[]",) if section["methods"] else ()
    owns = [tuple(x for x in own if not x.startswith("compare.")) for own in grid.methods]
    return replace(
        grid,
        methods=tuple(
            dict.fromkeys((*own, *method, *one_alone) for method in listed for own in owns)
        ),
        swept=grid.swept | {name_of(one) for method in listed for one in method},
        seeds=grid.seeds or tuple(section["seeds"]),
        tune=section["tune"],
    )


def settings_in(text: str) -> tuple[str, ...]:
    """Return the settings of a text such as `optim=adamw update=whole`.

    Raises:
        ValueError: If a quotation mark does not end.
    """
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ValueError(f"{text}: {error}") from error


def grid_of(arguments: Sequence[str]) -> Grid:
    """Return the grid of the arguments of a sweep, such as `optim=adamw,sgd seed=0,1`.

    Raises:
        HydraException: If an argument is not in Hydra's grammar.
        ValueError: If a learning rate or a seed is not a number.
    """
    overrides = OverridesParser.create().parse_overrides(list(arguments))
    own = [one for one in overrides if name_of(str(one.input_line)) not in (LEARNING_RATE, SEED)]
    methods = itertools.product(*(list(_choices(one)) for one in own))
    return Grid(
        methods=tuple(dict.fromkeys(tuple(method) for method in methods)),
        swept=frozenset(name_of(str(one.input_line)) for one in own if one.is_sweep_override()),
        rates=tuple(_read(float, one) for one in _values(overrides, LEARNING_RATE)),
        seeds=tuple(_read(int, one) for one in _values(overrides, SEED)),
    )


def _choices(override: Override) -> Iterator[str]:
    if not override.is_sweep_override():
        yield str(override.input_line)
        return
    for choice in override.sweep_string_iterator():
        yield f"{override.get_key_element()}={choice}"


def _values(overrides: Sequence[Override], name: str) -> Iterator[str]:
    """Yield the settings of one name, such as `seed=0` and `seed=1`."""
    for override in overrides:
        if name_of(str(override.input_line)) == name:
            yield from _choices(override)


def _read(kind: Callable[[str], T], setting: str) -> T:
    try:
        return kind(setting.partition("=")[2])
    except ValueError as error:
        raise ValueError(f"{setting}: must be a number, or several: seed=0,1,2") from error
