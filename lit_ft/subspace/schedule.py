"""Decide when bases move: the optimizer steps at which each layer has its turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lit_ft.subspace.checks import check_settings


@dataclass(frozen=True)
class Refresh:
    """How often bases move.

    Adaptive refreshes follow Q-GaLore (arXiv:2407.08296), which doubles a layer's interval while
    its successive projections agree. There are two differences. First, this compares whole
    subspaces. Q-GaLore's code compares first vectors, and requires a mean of at least 0.4 over
    five comparisons. Second, a basis that moves again gets its usual interval back.

    Adaptive refreshes suit only rules that can replace the whole basis in one move. One step of
    `Oja` or `Online` leaves an overlap near 1 (0.9999), so every layer would soon wait as long as
    `longest` allows.

    The threshold must allow for the noise of batches. With the weights unchanged, the bases that
    `SubspaceIteration` computes from two batches of 12 short rows overlap by 0.55 on average, and
    by 0.35 to 0.8 in single layers (SmolLM2-135M, rank 64). With larger batches, the overlap is
    larger.

    Attributes:
        every: The number of optimizer steps between two turns of a layer; None uses the projector's
            own interval.
        stagger: Whether to spread the layers' turns over the interval, so that no single step pays
            for all of them.
        adaptive: Whether a layer whose basis has stopped moving waits twice as long for its next
            turn. Once its basis moves again, it waits for `every` steps as before.
        threshold: The smallest overlap of a layer's last two bases (see `stats.overlap`), above 0
            and at most 1, at which its basis is taken to have stopped moving.
        longest: The longest wait of an adaptive schedule, as a multiple of `every`.

    Raises:
        ValueError: If `every`, `threshold` or `longest` is out of its range.
    """

    every: int | None = None
    stagger: bool = True
    adaptive: bool = False
    threshold: float = 0.4
    longest: int = 8

    def __post_init__(self) -> None:
        """Raise ValueError for a number that is out of its range."""
        if self.every is not None:
            check_settings(every=self.every)
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold}: give an overlap above 0 and up to 1.")
        if self.longest < 1:
            raise ValueError(f"longest={self.longest}: give a multiple of `every`, at least 1.")


class RefreshSchedule:
    """Keeps the step of each layer's next turn, at which its basis moves.

    The schedule is the same on every rank, and a resumed run continues it.

    Args:
        names: The names of the layers, in the order in which they take turns.
        refresh: The settings for how often bases move.
        every: The projector's interval in optimizer steps, used if `refresh` sets none.
        at_once: Whether all layers have their first turn at step 0. Projectors need this if they
            compute the basis from the gradient of the step that follows.
        step: The optimizer step that comes next, counted from 0.
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
        """Return the first turn of layer `name` at `step` or later."""
        offset = self._offsets[name]
        if not self.at_once:
            return step + (offset - 1 - step) % self.every
        return max(step, offset + 1) + (offset - max(step, offset + 1)) % self.every if step else 0

    def is_due(self, name: str, step: int) -> bool:
        """Whether the basis of layer `name` moves at `step`."""
        return self.next[name] <= step

    def after(self, name: str, step: int) -> int:
        """Return layer `name`'s first turn after `step`, if its interval does not change."""
        if not self.is_due(name, step):
            return self.next[name]
        if self.at_once and step == 0:
            return self._first(name, 1)
        return step + self.interval[name]

    def advance(self, step: int, overlaps: Mapping[str, float]) -> None:
        """End `step`, and set the next turn of each layer that moved in its turn.

        Args:
            step: The optimizer step that ends.
            overlaps: The overlap of the last two bases of each layer that moved, keyed by name. The
                values matter only to an adaptive schedule.
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
        """Continue from `state`, or start again at `step` if its settings were different."""
        if state.get("made_with") == self._made_with:
            self.next, self.interval = dict(state["next"]), dict(state["interval"])
        else:
            self._start(step)

    @property
    def _made_with(self) -> dict[str, Any]:
        return {**asdict(self.refresh), "every": self.every}
