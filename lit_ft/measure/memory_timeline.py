"""The memory of a tracked stretch of a run in the course of time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from lit_ft.measure.live_memory import CATEGORIES, Event
from lit_ft.measure.memory_peaks import Bytes, by_category
from lit_ft.measure.memory_picture import Phase

_MOMENTS = 60  # of a phase: more cannot be told apart in a picture


def timeline(events: Sequence[Event]) -> list[Phase]:
    """Return the phases of a stretch in their order, with the memory in use at moments of each.

    A moment is the highest of a short time, so the peak of each phase is among its moments. What
    was there before the stretch is in all of them.

    Args:
        events: The allocations and releases in their order, after `peaks_of` has set their
            categories.
    """
    phases = []
    for name, moments in groupby(_moments(events), key=lambda moment: moment[0]):
        held = [bytes_ for _, bytes_ in moments]
        if name != "load":
            size = -(-len(held) // _MOMENTS)
            parts = [held[start : start + size] for start in range(0, len(held), size)]
            phases.append(Phase(name, [by_category(max(part, key=sum)) for part in parts]))
    return phases


def _moments(events: Sequence[Event]) -> Iterator[tuple[str, Bytes]]:
    """Yield the phase of each event, with the bytes in use after it."""
    held = [0] * len(CATEGORIES)
    for event in events:
        size = event.storage.bytes if event.allocates else -event.storage.bytes
        held[CATEGORIES.index(event.storage.category)] += size
        yield event.place.phase, tuple(held)
