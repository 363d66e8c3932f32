"""The course of a run: its losses by step, tokens and seconds, in a bounded number of points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

MOST = 200
"""The largest number of points of a curve."""

Point = dict[str, Any]


class History:
    """Collects the training and the validation losses of a run, over all of its starts.

    Attributes:
        curves: The points of the curves `train` and `val`, in the order of their steps.
        tokens_before: The tokens that earlier starts have trained on.
        seconds_before: The seconds that the training steps of earlier starts have taken.
    """

    def __init__(self) -> None:
        self.curves: dict[str, list[Point]] = {"train": [], "val": []}
        self.tokens_before = 0
        self.seconds_before = 0.0

    def note(
        self, curve: str, loss: float, *, step: int, tokens: int | None, seconds: float | None
    ) -> None:
        """Add a point to a curve, in place of those at the same or a later step.

        Args:
            curve: The name of the curve, "train" or "val".
            loss: The loss at the point.
            step: The optimizer steps before the point, over all starts.
            tokens: The tokens of this start before the point; None if they are not counted.
            seconds: The seconds of the training steps of this start; None if they are not measured.
        """
        point = {
            "step": step,
            "tokens": None if tokens is None else self.tokens_before + tokens,
            "seconds": None if seconds is None else round(self.seconds_before + seconds, 3),
            f"{curve}_loss": loss,
        }
        earlier = [one for one in self.curves[curve] if one["step"] < step]
        self.curves[curve] = thinned([*earlier, point])

    def state_dict(self, *, tokens: int | None, seconds: float | None) -> dict[str, Any]:
        """Return what a run that resumes here goes on with, as plain values.

        Args:
            tokens: The tokens of this start so far; None if they are not counted.
            seconds: The seconds of the training steps so far; None if they are not measured.
        """
        return {
            "curves": deepcopy(self.curves),
            "tokens": self.tokens_before + (tokens or 0),
            "seconds": self.seconds_before + (seconds or 0.0),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the history of an earlier start."""
        self.curves = deepcopy(state_dict["curves"])
        self.tokens_before = state_dict["tokens"]
        self.seconds_before = state_dict["seconds"]

    def add_earlier(self, curves: Mapping[str, Sequence[Point]], *, until: int) -> None:
        """Add what an earlier start noted after it had saved the checkpoint of this one.

        Args:
            curves: The curves of the earlier start.
            until: The step from which this start goes on. Later points are of a lost part.
        """
        for name, own in self.curves.items():
            points = {one["step"]: one for one in [*curves.get(name, []), *own]}
            self.curves[name] = thinned([points[step] for step in sorted(points) if step <= until])


def thinned(points: Sequence[Point], most: int = MOST) -> list[Point]:
    """Return at most `most` points that are spread over all steps, with the first and the last.

    Args:
        points: The points in the order of their steps.
        most: The largest number of points to return, at least 2.
    """
    kept = list(points)
    while len(kept) > most:
        # The one whose neighbours are closest together is missed least.
        gaps = [
            after["step"] - before["step"] for before, after in zip(kept, kept[2:], strict=False)
        ]
        del kept[1 + gaps.index(min(gaps))]
    return kept
