"""Draw the memory of a run, stacked by use: a page of one file that opens without a network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment

from lit_ft.measure.live_memory import (
    ACTIVATIONS,
    GRADIENTS,
    OPTIMIZER,
    SUBSPACE,
    TEMPORARIES,
    USES,
    WEIGHTS,
)
from lit_ft.storage.atomic import write_text
from lit_ft.terminal.console import format_bytes

_TEMPLATE = Path(__file__).with_name("memory_picture.html.jinja")
# From the bottom up: what stays for the whole run comes first.
_ORDER = (WEIGHTS, OPTIMIZER, SUBSPACE, GRADIENTS, ACTIVATIONS, TEMPORARIES)
_WIDTH, _HEIGHT = 660.0, 320.0  # of the area with the bars, in pixels
_MOST_TICKS = 6
_LABEL_WIDTH = 84.0  # pixels of the longest phase, or of its bytes
_FARTHEST = 3.0  # times the peak: a limit beyond it would leave the bars too low to read


@dataclass(frozen=True)
class Phase:
    """A part of a run, and the memory in use at one or more moments of it.

    Attributes:
        name: The name of the phase.
        moments: The bytes by category at each moment, in the order of time.
    """

    name: str
    moments: Sequence[Mapping[str, int]]

    @property
    def highest(self) -> Mapping[str, int]:
        """The bytes by category at the moment with the most in use."""
        return max(self.moments, key=lambda held: sum(held.values()))


@dataclass(frozen=True)
class Limit:
    """The memory of a device.

    Attributes:
        name: The name of the device.
        nbytes: The bytes that it has.
        for_tensors: The lowest and the highest number of bytes that tensors can have of it; None
            if that is not known.
    """

    name: str
    nbytes: int
    for_tensors: tuple[int, int] | None = None


def write_picture(
    file: Path,
    title: str,
    phases: Sequence[Phase],
    *,
    facts: Mapping[str, str],
    limit: Limit | None = None,
) -> None:
    """Write a page with a bar for each moment of each phase, and the figures in a table.

    Args:
        file: The HTML file to write, whose folder is created if it is missing.
        title: The title of the page.
        phases: The phases in the order of the run.
        facts: What the page shows of the run, keyed by what it is about.
        limit: The device to hold the bars against. One with much more memory than the peak is
            named, but not drawn.
    """
    highest = peak = max(sum(phase.highest.values()) for phase in phases)
    drawn = limit if limit is not None and limit.nbytes <= _FARTHEST * peak else None
    if drawn is not None:
        highest = max(peak, drawn.nbytes)
    step = _step(highest)
    ticks = range(0, highest + step, step)
    scale = _HEIGHT / ticks[-1]
    used = [one for one in _ORDER if any(phase.highest.get(one) for phase in phases)]
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page.filters["bytes"] = format_bytes
    text = page.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        facts=facts,
        width=_WIDTH,
        height=_HEIGHT,
        ticks=[(_HEIGHT - nbytes * scale, nbytes) for nbytes in ticks],
        bars=list(_bars(phases, scale)),
        labels=list(_labels(phases)),
        limit=limit,
        drawn=None if drawn is None else _drawn(drawn, scale),
        uses={one: USES[one] for one in used},
        phases=phases,
    )
    write_text(file, text)


def _step(nbytes: float) -> int:
    """Return the distance of the ticks: the smallest power of two that needs few."""
    step = 1
    while nbytes / step >= _MOST_TICKS:
        step *= 2
    return step


def _drawn(limit: Limit, scale: float) -> dict[str, float]:
    drawn = {"y": _HEIGHT - limit.nbytes * scale}
    if limit.for_tensors is not None:
        low, high = limit.for_tensors
        drawn |= {"high": _HEIGHT - max(0, high) * scale, "low": _HEIGHT - max(0, low) * scale}
    return drawn


def _slots(phases: Sequence[Phase]) -> Iterator[tuple[Phase, float, float]]:
    """Yield each phase with its left edge and its width, all of the same width."""
    width = _WIDTH / len(phases)
    for number, phase in enumerate(phases):
        yield phase, number * width, width


def _bars(phases: Sequence[Phase], scale: float) -> Iterator[dict[str, Any]]:
    for phase, left, width in _slots(phases):
        gap = 0.15 * width if len(phase.moments) == 1 else 1.0
        each = (width - 2 * gap) / len(phase.moments)
        for number, held in enumerate(phase.moments):
            yield {
                "phase": phase.name,
                "x": left + gap + number * each,
                "width": each,
                "held": held,
                "parts": list(_parts(held, scale)),
            }


def _parts(held: Mapping[str, int], scale: float) -> Iterator[tuple[str, float, float]]:
    """Yield each category of a bar with the y and the height of its part."""
    y = _HEIGHT
    for category in _ORDER:
        height = held.get(category, 0) * scale
        if height:
            y -= height
            yield category, y, height


def _labels(phases: Sequence[Phase]) -> Iterator[tuple[float, Phase]]:
    """Yield the middle of each phase that has room for its name."""
    for phase, left, width in _slots(phases):
        if width >= _LABEL_WIDTH:
            yield left + width / 2, phase
