"""Hold a memory plan against a card: what it needs in addition to tensors, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lit_ft.measure.cards import Card
from lit_ft.measure.live_memory import ACTIVATIONS
from lit_ft.measure.memory_plan import MemoryPlan

_GIB = 1 << 30
MOST_TOO_MUCH = 0.04
"""The largest share by which a plan has been above what the same run takes; see docs/memory.md."""

Verdict = Literal["fits", "tight", "does not fit"]


@dataclass(frozen=True)
class Outside:
    """The memory of a device that tensors do not account for, as a range in bytes.

    On a GPU it is the CUDA context with the loaded kernels (0.3 to 0.7 GiB), the workspaces of
    cuBLAS (up to 0.1 GiB), what the allocator cannot use because it is in pieces (1 to 5% of the
    peak), and the buffers of NCCL with several ranks (0.2 to 1 GiB). These bounds are taken from
    the libraries' documentation and not measured on each card. On the CPU it is the process with
    its libraries, the data, and what malloc keeps of freed activations: as much again as they take
    in a run of LoRA on SmolLM2 (5.8 GiB measured, 3.2 of them tensors), a third with GaLore.
    """

    low: int
    high: int

    @classmethod
    def of(cls, plan: MemoryPlan, *, device_type: str, ranks: int) -> Outside:
        """Return the range for a plan."""
        if device_type == "cpu":
            kept = max(held[ACTIVATIONS] for held in plan.by_phase.values())
            return cls(int(0.4 * _GIB), int(1.0 * _GIB) + kept)
        several = ranks > 1
        low = (0.3 + 0.2 * several) * _GIB + 0.01 * plan.peak_bytes
        high = (0.8 + 1.0 * several) * _GIB + 0.05 * plan.peak_bytes
        return cls(int(low), int(high))


def verdict(plan: MemoryPlan, outside: Outside, card: Card) -> Verdict:
    """Return whether a plan fits on a card; "tight" means that it depends on what is outside."""
    if plan.peak_bytes + outside.high <= card.memory_bytes:
        return "fits"
    return "tight" if plan.peak_bytes + outside.low <= card.memory_bytes else "does not fit"


def cannot_fit(nbytes: int, outside: Outside, card: Card) -> bool:
    """Return whether planned bytes exceed a card by more than the error of plans.

    Args:
        nbytes: The planned bytes of tensors.
        outside: The memory that the device needs in addition to tensors.
        card: The card that they have to fit on.
    """
    return nbytes / (1 + MOST_TOO_MUCH) + outside.low > card.memory_bytes
