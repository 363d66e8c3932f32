"""Plan the memory of a training from a few steps of it on fake tensors."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lit_ft.measure.fake_fit import fake_fit
from lit_ft.measure.forked import forked
from lit_ft.measure.kernel_temporaries import tracker_on
from lit_ft.measure.live_memory import (
    OPTIMIZER,
    SUBSPACE,
    WEIGHTS,
)
from lit_ft.measure.memory_peaks import Peaks, by_category, extended, peaks_of

# From this depth and the next, the peaks of all deeper models follow. Of two blocks, the one before
# the last would be the first one too, which has no block before it.
_SHALLOWEST = 3


@dataclass(frozen=True)
class MemoryPlan:
    """The memory that a training will take on each device.

    Attributes:
        peak_bytes: The most bytes of tensors at once.
        peak_phase: The phase of the run in which the peak lies.
        peak_stack: The operation that allocates at the peak, and the Python functions that have
            called it, the innermost first.
        by_category: The bytes of weights, gradients, optimizer state, subspaces, activations and
            temporaries at the peak.
        by_phase: The bytes of each category at the peak of each phase.
        held_bytes: The bytes that weights, subspaces and optimizer state take between two steps.
        blocks: The number of the model's blocks.
        simulated_blocks: The numbers of blocks of the models that took fake steps.
        seconds: The time that the plan took.
    """

    peak_bytes: int
    peak_phase: str
    peak_stack: Sequence[str]
    by_category: dict[str, int]
    by_phase: dict[str, dict[str, int]]
    held_bytes: dict[str, int]
    blocks: int
    simulated_blocks: tuple[int, ...]
    seconds: float

    @property
    def peak_by_phase(self) -> dict[str, int]:
        """The most bytes of tensors at once in each phase."""
        return {phase: sum(held.values()) for phase, held in self.by_phase.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values."""
        return asdict(self)


def plan_memory(
    build: Callable[[int | None], tuple[LightningModule, Trainer]],
    batch: Mapping[str, Any],
    val_batch: Mapping[str, Any],
    *,
    blocks: int | None,
    shallowest: int = _SHALLOWEST,
    device_type: str = "cpu",
    ranks: int = 1,
) -> MemoryPlan:
    """Return the plan of a training.

    Args:
        build: The function that builds the module and its trainer, for `fake_fit`, with the given
            number of blocks; None means all blocks.
        batch: The micro-batch of the training steps.
        val_batch: The batch of the validation.
        blocks: The number of blocks of the whole model if all are alike; None simulates it whole.
        shallowest: The number of blocks of the shallower of two models that stand for the whole
            one. It must have a block in its middle that is like those that are added.
        device_type: The device to train on: "cpu" or "cuda".
        ranks: The number of ranks. If there are several, Python code finds the fake tensors on the
            CPU, because FSDP2 asks a GPU that it sees for its streams.
    """
    start = time.monotonic()

    def peaks_at(depth: int | None) -> Peaks:
        return _peaks(build, batch, val_batch, depth, device_type, ranks)

    shallow, deep = shallowest, shallowest + 1
    if blocks is not None and blocks > deep:
        with forked(lambda: peaks_at(shallow)) as result:
            deeper = peaks_at(deep)
            found = [result(), deeper]
        peaks = extended(found[0], deeper, blocks)
    else:
        peaks = peaks_at(None)
        found = [peaks]
    highest, held = peaks.highest
    return MemoryPlan(
        peak_bytes=round(sum(held)),
        peak_phase=highest[0],
        peak_stack=peaks.at[highest],
        by_category=by_category(held),
        by_phase=peaks.by_phase(),
        held_bytes={name: peaks.most(name) for name in (WEIGHTS, SUBSPACE, OPTIMIZER)},
        blocks=peaks.blocks,
        simulated_blocks=tuple(each.blocks for each in found),
        seconds=time.monotonic() - start,
    )


def _peaks(
    build: Callable[[int | None], tuple[LightningModule, Trainer]],
    batch: Mapping[str, Any],
    val_batch: Mapping[str, Any],
    depth: int | None,
    device_type: str,
    ranks: int,
) -> Peaks:
    module, trainer = build(depth)
    tracker = tracker_on(device_type, keeps_stacks=True)
    seen = device_type if ranks == 1 else "cpu"
    blocks = fake_fit(module, trainer, batch, val_batch, tracker, device_type=seen)
    return peaks_of(tracker.events, blocks)
