"""The runs of some folders, read from their summaries alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lit_ft.comparison.settings import settings_of
from lit_ft.run.files import SUMMARY, read_summary

_LARGEST = sys.float_info.max


@dataclass(frozen=True)
class Run:
    """A run, as its summary describes it.

    Attributes:
        folder: The folder of the run.
        summary: The content of its summary, in which any entry may be absent.
    """

    folder: Path
    summary: Mapping[str, Any]

    def get(self, *path: str) -> Any:
        """Return an entry of the summary; None if it is absent."""
        node: Any = self.summary
        for name in path:
            node = node.get(name) if isinstance(node, Mapping) else None
        return node

    def number(self, *path: str) -> float | None:
        """Return an entry of the summary if it is a finite number; else None."""
        return as_number(self.get(*path))

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings that can make a difference, keyed by name; see `settings_of`."""
        return settings_of(self.summary["config"])

    @property
    def seed(self) -> int | None:
        """The seed of the run."""
        seed = self.number("seed")
        return None if seed is None else int(seed)

    @property
    def loss(self) -> float | None:
        """The held-out loss at the end; None unless the run is completed."""
        return loss_of(self.summary)

    @property
    def is_pruned(self) -> bool:
        """Whether the run was ended early because its learning rate was worse than others."""
        return bool(self.get("status") == "pruned")

    @property
    def status(self) -> str:
        """The status of the run, in words."""
        return str(self.get("status")).replace("_", " ")

    @property
    def reason(self) -> str:
        """Why the run has no result."""
        ended = self.get("ended")
        if self.get("status") == "completed":
            return "the loss at its end is not a number"
        if not ended:
            return "it was killed, or has not ended yet"
        return str(ended).removeprefix("pruned: ")

    @property
    def arguments(self) -> list[str] | None:
        """The arguments of the newest start; None if the run ended before it noted them."""
        starts = self.get("starts")
        newest = starts[-1] if isinstance(starts, list) and starts else None
        found = newest.get("arguments") if isinstance(newest, Mapping) else None
        return [str(one) for one in found] if isinstance(found, list) else None

    def curve(self, name: str) -> list[dict[str, float]]:
        """Return the points of a curve of the history that have a loss, in the order of steps.

        Args:
            name: The name of the curve, "train" or "val".
        """
        found = self.get("history", name)
        points = []
        for one in found if isinstance(found, list) else []:
            if isinstance(one, Mapping):
                numbers = {key: as_number(value) for key, value in one.items()}
                point = {key: value for key, value in numbers.items() if value is not None}
                if "step" in point and f"{name}_loss" in point:
                    points.append(point)
        return sorted(points, key=lambda point: point["step"])


@dataclass(frozen=True)
class Damaged:
    """A folder whose summary cannot be read.

    Attributes:
        folder: The folder.
        reason: What is wrong with the summary, and the remedy.
    """

    folder: Path
    reason: str


def gather(folders: Iterable[Path]) -> tuple[list[Run], list[Damaged]]:
    """Return the runs in some folders and below them, each once, and those that are damaged.

    Args:
        folders: The folders. Each holds a run, or folders with runs.

    Raises:
        ValueError: If a folder does not exist, or holds no run.
    """
    runs, damaged = [], []
    for folder in _run_folders(folders):
        try:
            summary = read_summary(folder)
        except (ValueError, OSError) as error:
            damaged.append(Damaged(folder, str(error)))
        else:
            if summary is None:
                damaged.append(Damaged(folder, f"{folder / SUMMARY} is no file"))
            else:
                runs.append(Run(folder, summary))
    return runs, damaged


def _run_folders(folders: Iterable[Path]) -> list[Path]:
    found: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            what = "is not a folder" if folder.exists() else "does not exist"
            raise ValueError(f"{folder} {what}: name the folder of a run or of a sweep")
        own = list(_below(folder))
        if not own:
            raise ValueError(
                f"{folder} holds no run: neither it nor a folder in it has a {SUMMARY}. "
                "Name a folder that `python train.py` has written, such as runs"
            )
        for one in own:
            found.setdefault(one.resolve(), one)
    return sorted(found.values(), key=folder_order)


def _below(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        # Hidden ones hold the records of starts, with the summary of one that has not begun.
        folders[:] = [name for name in folders if not name.startswith(".")]
        if SUMMARY in files or SUMMARY in folders:
            yield Path(place)


def folder_order(folder: Path) -> list[tuple[int, str]]:
    """Return what sorts folders by name, those of a sweep by number."""
    return [(int(part) if part.isdecimal() else -1, part) for part in folder.parts]


def loss_of(summary: Mapping[str, Any]) -> float | None:
    """Return the held-out loss at the end of a run; None unless it is completed and finite."""
    return as_number(summary.get("val_loss")) if summary.get("status") == "completed" else None


def as_number(value: Any) -> float | None:
    """Return a finite number; None for all else.

    >>> as_number(2), as_number("2"), as_number(True), as_number(float("nan"))
    (2, None, None, None)
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and abs(value) <= _LARGEST else None
