"""The peaks of a recorded run by phase and category, and those of a deeper model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lit_ft.measure.call_stack import described
from lit_ft.measure.live_memory import (
    ACTIVATIONS,
    CATEGORIES,
    TEMPORARIES,
    Event,
    Place,
    Storage,
)

# A stretch of a run whose peak is a linear function of the number of blocks: a phase, an optimizer
# step, and a block counted from the first ("start") or from the last one ("end").
Stretch = tuple[str, int, str, int]
_PLACES = {
    ("start", -1): " before the first block",
    ("start", 0): " in the first block",
    ("start", 1): " in the second block",
    ("end", 2): " in the last block but one",
    ("end", 1): " in the last block",
    ("end", 0): " after the last block",
}
# The bytes of each of `CATEGORIES`, in their order.
Bytes = tuple[float, ...]


@dataclass(frozen=True)
class Peaks:
    """The most memory in use in each stretch of a run, with what it was used for.

    Attributes:
        blocks: The number of the model's blocks.
        by_stretch: The bytes of each category at the peak of each stretch.
        at: The operation that allocates at the peak of each stretch, and the Python functions that
            have called it, the innermost first.
    """

    blocks: int
    by_stretch: Mapping[Stretch, Bytes]
    at: Mapping[Stretch, tuple[str, ...]]

    @property
    def highest(self) -> tuple[Stretch, Bytes]:
        """The stretch with the highest peak of all, and its bytes by category."""
        return max(self.by_stretch.items(), key=lambda peak: sum(peak[1]))

    def most(self, category: str) -> int:
        """Return the most bytes of a category that are held at the peak of any stretch."""
        place = CATEGORIES.index(category)
        return round(max(held[place] for held in self.by_stretch.values()))

    def by_phase(self) -> dict[str, dict[str, int]]:
        """Return the bytes of each category at the peak of each phase, in the order of the run."""
        highest: dict[str, Bytes] = {}
        for (phase, *_), held in self.by_stretch.items():
            highest[phase] = max(highest.get(phase, held), held, key=sum)
        return {phase: by_category(held) for phase, held in highest.items()}


def by_category(held: Bytes) -> dict[str, int]:
    """Return the bytes of each category, keyed by its name."""
    return {name: round(size) for name, size in zip(CATEGORIES, held, strict=True)}


def peaks_of(events: Sequence[Event], blocks: int) -> Peaks:
    """Return the peaks of a run that a `MemoryTracker` has recorded.

    What forward allocates and keeps for backward counts as activations.

    Args:
        events: The allocations and releases, in their order.
        blocks: The number of the model's blocks.
    """
    _classify(events)
    index = {category: number for number, category in enumerate(CATEGORIES)}
    held = [0] * len(CATEGORIES)
    total = 0
    found: dict[Stretch, tuple[int, Bytes, Event]] = {}
    for event in events:
        size = event.storage.bytes if event.allocates else -event.storage.bytes
        held[index[event.storage.category]] += size
        total += size
        if event.allocates:
            for stretch in _stretches(event.place, blocks):
                if stretch not in found or total > found[stretch][0]:
                    found[stretch] = total, tuple(held), event
    return Peaks(
        blocks,
        {stretch: peak for stretch, (_, peak, _) in found.items()},
        {
            stretch: (
                f"{event.storage.operation}{_PLACES.get(stretch[2:], '')}",
                *described(event.stack),
            )
            for stretch, (_, _, event) in found.items()
        },
    )


def extended(shallow: Peaks, deeper: Peaks, blocks: int) -> Peaks:
    """Return the peaks of a model with `blocks` blocks, from those of two shallower ones.

    Each block adds the same to each stretch, since all are alike. The highest stretch of the deep
    model need not be that of a shallow one, so each is extended by itself.

    Args:
        shallow: The peaks of a model with at least three blocks.
        deeper: The peaks of the same model with more blocks.
        blocks: The number of blocks to extend to.
    """
    if shallow.by_stretch.keys() != deeper.by_stretch.keys():
        raise ValueError("The two models do not go through the same stretches.")
    factor = (blocks - deeper.blocks) / (deeper.blocks - shallow.blocks)
    found: dict[Stretch, Bytes] = {}
    for stretch, held in deeper.by_stretch.items():
        pairs = zip(shallow.by_stretch[stretch], held, strict=True)
        more = tuple(high + factor * (high - low) for low, high in pairs)
        # Nothing takes less in a deeper model. What torch makes at its first call alone may be in
        # the shallow one only.
        found[stretch] = more if sum(more) >= sum(held) else held
    return Peaks(blocks, found, deeper.at)


def _classify(events: Iterable[Event]) -> None:
    """Tell activations from the temporaries of a forward pass: they outlive it."""
    open_: set[Storage] = set()
    for event in events:
        storage = event.storage
        if storage.category != TEMPORARIES or storage.place.phase != "forward":
            continue
        if event.allocates:
            open_.add(storage)
        else:
            open_.discard(storage)
            if event.place.phase != "forward":
                storage.category = ACTIVATIONS
    for storage in open_:
        storage.category = ACTIVATIONS


def _stretches(place: Place, blocks: int) -> list[Stretch]:
    """Return the stretches that a place belongs to: none in the middle of a model.

    There, memory grows or falls by the same amount from block to block, so no peak is higher than
    those at both ends.
    """
    if place.block is None:
        return [(place.phase, place.step, "all", 0)]
    found = []
    if place.block <= 1:
        found.append((place.phase, place.step, "start", place.block))
    if place.block >= blocks - 2:
        found.append((place.phase, place.step, "end", blocks - place.block))
    return found
