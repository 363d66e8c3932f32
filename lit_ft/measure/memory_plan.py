"""Plan the memory of a training from a few steps of it on fake tensors."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lit_ft.measure import kernel_temporaries
from lit_ft.measure.fake_fit import fake_fit
from lit_ft.measure.live_memory import (
    CATEGORIES,
    OPTIMIZER,
    SUBSPACE,
    WEIGHTS,
    MemoryTracker,
)
from lit_ft.measure.memory_peaks import Peaks, extended, peaks_of

# From these depths, the peaks of all deeper models follow.
_DEPTHS = (3, 4)
_CUDA_GRANULE = 512  # torch's allocator on CUDA gives out multiples of it


@dataclass(frozen=True)
class MemoryPlan:
    """The memory that a training will take on each device.

    Attributes:
        peak_bytes: The most bytes of tensors at once.
        peak_phase: The phase of the run in which the peak lies.
        by_category: The bytes of weights, gradients, optimizer state, subspaces, activations and
            temporaries at the peak.
        by_phase: The peak in bytes of each phase.
        held_bytes: The bytes that weights, subspaces and optimizer state take between two steps.
        blocks: The number of the model's blocks.
        simulated_blocks: The numbers of blocks of the models that took fake steps.
        seconds: The time that the plan took.
    """

    peak_bytes: int
    peak_phase: str
    by_category: dict[str, int]
    by_phase: dict[str, int]
    held_bytes: dict[str, int]
    blocks: int
    simulated_blocks: tuple[int, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values."""
        return asdict(self)


def plan_memory(
    build: Callable[[int | None], tuple[LightningModule, Trainer]],
    batch: Mapping[str, Any],
    val_batch: Mapping[str, Any],
    *,
    blocks: int | None,
    device_type: str = "cpu",
) -> MemoryPlan:
    """Return the plan of a training.

    Args:
        build: The function that builds the module and its trainer, for `fake_fit`, with the given
            number of blocks; None means all blocks.
        batch: The micro-batch of the training steps.
        val_batch: The batch of the validation.
        blocks: The number of blocks of the whole model if all are alike; None simulates it whole.
        device_type: The device to train on: "cpu" or "cuda".
    """
    start = time.monotonic()
    depths: tuple[int | None, ...] = (None,)
    if blocks is not None and blocks > max(_DEPTHS):
        depths = _DEPTHS
    found = [_peaks(build, batch, val_batch, depth, device_type) for depth in depths]
    peaks = found[0] if len(found) == 1 else extended(found[0], found[1], blocks or 0)
    (phase, *_), held = peaks.highest
    return MemoryPlan(
        peak_bytes=round(sum(held)),
        peak_phase=phase,
        by_category={name: round(n) for name, n in zip(CATEGORIES, held, strict=True)},
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
) -> Peaks:
    module, trainer = build(depth)
    on_cpu = device_type == "cpu"
    tracker = MemoryTracker(
        granule=1 if on_cpu else _CUDA_GRANULE,
        temporaries=kernel_temporaries.on_cpu if on_cpu else kernel_temporaries.on_cuda,
    )
    blocks = fake_fit(module, trainer, batch, val_batch, tracker, device_type=device_type)
    return peaks_of(tracker.events, blocks)
