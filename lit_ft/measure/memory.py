"""Memory as the device reports it, and the share of weights and optimizer state in it."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_ft.measure.storage_bytes import storage_bytes

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class MemoryReading(NamedTuple):
    """`value` in bytes, and `source`: what was measured, since devices report different things.

    `cuda_allocated`: bytes in live tensors on one GPU, without the allocator's cache.
    `mps_driver_allocated`: bytes that Metal's driver holds for this process, cache included; the
    driver keeps no peak, so a peak from this source is the amount held at the time of asking.
    `process_rss`: resident memory of the whole process, with the interpreter and its libraries.
    """

    value: int
    source: str


def peak_bytes(device: torch.device | str = "cpu") -> MemoryReading:
    """Most memory in use on `device` since the last `reset_peak`, or since the process started."""
    device = torch.device(device)
    if device.type == "cuda":
        return MemoryReading(torch.cuda.max_memory_allocated(device), "cuda_allocated")
    if device.type == "mps":
        return MemoryReading(torch.mps.driver_allocated_memory(), "mps_driver_allocated")
    return MemoryReading(_peak_resident_bytes(), "process_rss")


def current_bytes(device: torch.device | str = "cpu") -> MemoryReading:
    """Memory in use on `device` now."""
    device = torch.device(device)
    if device.type == "cuda":
        return MemoryReading(torch.cuda.memory_allocated(device), "cuda_allocated")
    if device.type == "mps":
        return MemoryReading(torch.mps.driver_allocated_memory(), "mps_driver_allocated")
    return MemoryReading(psutil.Process().memory_info().rss, "process_rss")


def reset_peak(device: torch.device | str = "cpu") -> bool:
    """Let `peak_bytes(device)` count from here; False where the system cannot do that.

    On the CPU this needs Linux and a writable /proc: elsewhere the peak stays that of the
    process's whole life. See proc(5), clear_refs, value 5.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    if device.type == "mps":
        return False
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def optimizer_state_bytes(optimizer: Optimizer) -> int:
    """Bytes of every tensor in the optimizer's state on this rank; 0 before the first step.

    Whatever is shared between parameters (bitsandbytes' quantile maps) counts once, a DTensor with
    its local shard.
    """
    return storage_bytes(chain.from_iterable(map(state_tensors, optimizer.state.values())))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters and persistent buffers on this rank.

    Tied weights count once, quantised ones as they are packed, with their scales.
    """
    return storage_bytes(_weight_tensors(model))


def state_tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor inside nested dicts, lists, tuples and plain objects."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from chain.from_iterable(map(state_tensors, value.values()))
    elif isinstance(value, list | tuple):
        yield from chain.from_iterable(map(state_tensors, value))
    elif hasattr(value, "__dict__"):  # galore-torch keeps its basis in an object
        yield from state_tensors(vars(value))


def _weight_tensors(model: nn.Module) -> Iterator[Tensor]:
    for parameter in model.parameters():
        yield parameter
        # bitsandbytes keeps a weight's scales beside it, as plain attributes.
        yield from _quantisation_tensors(getattr(parameter, "quant_state", None))
        yield from state_tensors(getattr(parameter, "SCB", None))
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield buffer


def _quantisation_tensors(state: Any) -> Iterator[Tensor]:
    while state is not None:
        yield from state_tensors(vars(state))
        state = getattr(state, "state2", None)


def _peak_resident_bytes() -> int:
    # Before getrusage: ru_maxrss survives exec, so a child of a large process inherits its peak.
    status = _STATUS.read_text() if _STATUS.exists() else ""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    if found:
        return int(found[1]) * 1024
    maxrss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return maxrss if sys.platform == "darwin" else maxrss * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was what was missing."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    # The CPU allocator raises a plain RuntimeError.
    return known or "can't allocate memory" in str(error)
