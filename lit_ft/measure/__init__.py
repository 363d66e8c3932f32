"""Measure the memory of a run, and estimate the size of its optimizer's state."""

from lit_ft.measure.memory import (
    MemoryReading,
    current_bytes,
    is_out_of_memory,
    optimizer_state_bytes,
    peak_bytes,
    reset_peak,
    weight_bytes,
)
from lit_ft.measure.optimizer_state import estimate_state_bytes

__all__ = [
    "MemoryReading",
    "current_bytes",
    "estimate_state_bytes",
    "is_out_of_memory",
    "optimizer_state_bytes",
    "peak_bytes",
    "reset_peak",
    "weight_bytes",
]
