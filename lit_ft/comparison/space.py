"""What a search tries: the values of each setting that is swept, as Optuna draws them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from lit_ft.comparison.trainable import Trainable, trainable

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


@dataclass(frozen=True)
class Space:
    """What a search tries.

    Attributes:
        fixed: The arguments that all trials have.
        distributions: What each setting that is searched is drawn from, keyed by its name as it is
            typed, with the plus of a new one.
    """

    fixed: tuple[str, ...]
    distributions: Mapping[str, BaseDistribution]

    def corners(self) -> Iterator[list[str]]:
        """Yield the arguments of trials that have each choice and each end of a range once."""
        values = {name: list(_ends(one)) for name, one in self.distributions.items()}
        for number in range(max(map(len, values.values()))):
            drawn = {name: own[min(number, len(own) - 1)] for name, own in values.items()}
            yield [*self.fixed, *settings_of(drawn)]

    @cached_property
    def methods(self) -> list[Trainable]:
        """The methods at the corners, composed once.

        Raises:
            ValueError: If an argument is wrong.
        """
        return [trainable(corner) for corner in self.corners()]


def space_of(arguments: Sequence[str]) -> Space:
    """Return what the arguments of a sweep ask for.

    `optim.lr=tag(log,interval(1e-5,1e-3))` draws any rate between two, `galore.rank=64,128` one of
    several values, and `trainer.max_steps=range(20,60,20)` one of 20 and 40.

    Raises:
        HydraException: If an argument is not in Hydra's grammar.
        ValueError: If no setting is swept, or if a range is empty.
    """
    overrides = OverridesParser.create().parse_overrides(list(arguments))
    swept = [one for one in overrides if one.is_sweep_override()]
    if not swept:
        raise ValueError(
            "Name what to search, such as `optim.lr=tag(log,interval(1e-5,1e-3))` or "
            "`galore.rank=64,128`."
        )
    return Space(
        fixed=tuple(str(one.input_line) for one in overrides if not one.is_sweep_override()),
        distributions={one.get_key_element(): _distribution(one) for one in swept},
    )


def settings_of(drawn: Mapping[str, Any]) -> list[str]:
    """Return the arguments of `train.py` for the values of a trial, which people can read."""
    return [
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in drawn.items()
    ]


def _distribution(override: Override) -> BaseDistribution:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    value: Any = override.value()
    try:
        if isinstance(value, IntervalSweep):
            low, high, log = value.start, value.end, "log" in value.tags
            assert low is not None and high is not None
            if isinstance(low, int) and isinstance(high, int):
                return IntDistribution(low, high, log=log)
            return FloatDistribution(float(low), float(high), log=log)
        if isinstance(value, RangeSweep) and isinstance(numbers := value.range(), range):
            return IntDistribution(numbers[0], numbers[-1], step=numbers.step)
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    except (ValueError, IndexError) as error:
        raise ValueError(f"{override.input_line}: {error}") from error


def _ends(distribution: Any) -> Iterator[Any]:
    if hasattr(distribution, "choices"):
        yield from distribution.choices
    else:
        yield from (distribution.low, distribution.high)
