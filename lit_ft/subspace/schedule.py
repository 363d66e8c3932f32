"""When bases move: whose turn it is at which optimizer step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lit_ft.subspace.checks import check_settings


@dataclass(frozen=True)
class Refresh:
    """How often bases move.

    Adaptive as Q-GaLore (arXiv:2407.08296) doubles a layer's interval while its successive
    projections agree, with two differences: whole subspaces are compared, where its code compares
    their first vectors (the mean of five, 0.4 or more), and a basis that moves again has its turns
    back. It is for rules that renew the basis: one step of `Oja` or `Online` leaves an overlap near
    1 (0.9999), so that every layer would soon wait `longest`.

    The threshold has to leave room for chance. At weights that do not move, the bases that
    `SubspaceIteration` takes from one batch of 12 short rows and the next overlap by 0.55 on
    average, 0.35 to 0.8 by layer (SmolLM2-135M, rank 64); larger batches agree more.

    Attributes:
        every: Optimizer steps between two turns of a layer; None for the projector's.
        stagger: Spread the layers' turns over the interval, so that no step pays for all.
        adaptive: A layer whose basis has stopped moving waits twice as long for its next turn, and
            `every` again as soon as it moves.
        threshold: The overlap of its last two bases (see `observation.overlap`) from which on a
            basis has stopped moving.
        longest: The longest wait, in multiples of `every`.

    Raises:
        ValueError: A number that is out of its range.
    """

    every: int | None = None
    stagger: bool = True
    adaptive: bool = False
    threshold: float = 0.4
    longest: int = 8

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.every is not None:
            check_settings(every=self.every)
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold}: an overlap lies above 0, up to 1.")
        if self.longest < 1:
            raise ValueError(f"longest={self.longest}: give a multiple of `every`, at least 1.")


class RefreshSchedule:
    """Each layer's next turn; the same on every rank, and continued by a resumed run.

    Args:
        names: The layers, in the order in which they take turns.
        refresh: How often.
        every: Of the projector, if `refresh` names none.
        at_once: The first turn is step 0's, for rules that move before a step, by its gradient.
        step: The optimizer step, from 0, that comes next.
    """

    def __init__(
        self,
        names: Sequence[str],
        refresh: Refresh,
        *,
        every: int,
        at_once: bool = False,
        step: int = 0,
    ) -> None:
        self.refresh = refresh
        self.every = refresh.every or every
        check_settings(every=self.every)
        self.at_once = at_once
        spread = self.every if refresh.stagger else 0
        self._offsets = {name: index * spread // len(names) for index, name in enumerate(names)}
        self._start(step)

    def _start(self, step: int) -> None:
        self.next = {name: self._first(name, step) for name in self._offsets}
        self.interval = dict.fromkeys(self._offsets, self.every)

    def _first(self, name: str, step: int) -> int:
        """The first turn at `step` or later."""
        offset = self._offsets[name]
        if not self.at_once:
            return step + (offset - 1 - step) % self.every
        return max(step, offset + 1) + (offset - max(step, offset + 1)) % self.every if step else 0

    def is_due(self, name: str, step: int) -> bool:
        """Whether the basis of layer `name` moves at `step`."""
        return self.next[name] <= step

    def after(self, name: str, step: int) -> int:
        """Return the turn of layer `name` that follows `step`, if its interval stays."""
        if not self.is_due(name, step):
            return self.next[name]
        if self.at_once and step == 0:
            return self._first(name, 1)
        return step + self.interval[name]

    def advance(self, step: int, overlaps: Mapping[str, float]) -> None:
        """End `step`: the layers that moved when it was their turn take their next one.

        Args:
            step: The step that ends.
            overlaps: Of the layers that moved, between their last two bases; only an adaptive
                schedule looks at the numbers.
        """
        for name in [name for name in overlaps if self.is_due(name, step)]:
            rests = overlaps[name] >= self.refresh.threshold
            if self.refresh.adaptive and rests:
                self.interval[name] = min(
                    2 * self.interval[name], self.refresh.longest * self.every
                )
            else:
                self.interval[name] = self.every
            self.next[name] = self.after(name, step)

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs."""
        return {"made_with": self._made_with, "next": self.next, "interval": self.interval}

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Continue from `state_dict`; another schedule's starts anew, at `step`."""
        if state.get("made_with") == self._made_with:
            self.next, self.interval = dict(state["next"]), dict(state["interval"])
        else:
            self._start(step)

    @property
    def _made_with(self) -> dict[str, Any]:
        return {**asdict(self.refresh), "every": self.every}
