"""Memory as the device reports it, and the bytes of weights and of optimizer state."""

from __future__ import annotations

import re
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
_taken: dict[torch.device, int] = {}  # the highest peak that `take_peak` has cleared, by GPU


class MemoryReading(NamedTuple):
    """An amount of memory, and its source, because devices report different things.

    The sources are:

    - `cuda_allocated`: live tensors on one GPU, without the allocator's cache;
    - `mps_driver_allocated`: memory that Metal's driver holds for this process, cache included. The
      driver keeps no peak, so a peak from this source is the amount held when it is read;
    - `process_rss`: resident memory of the whole process, interpreter and libraries included.

    Attributes:
        value: The amount of memory in bytes.
        source: The name of the source, one of those above.
    """

    value: int
    source: str


def peak_bytes(device: torch.device | str = "cpu") -> MemoryReading:
    """Return the peak memory in use on `device` since `reset_peak` or the process's start."""
    device = torch.device(device)
    if device.type == "cuda":
        peak = max(torch.cuda.max_memory_allocated(device), _taken.get(device, 0))
        return MemoryReading(peak, "cuda_allocated")
    if device.type == "mps":
        return MemoryReading(torch.mps.driver_allocated_memory(), "mps_driver_allocated")
    return MemoryReading(_peak_resident_bytes(), "process_rss")


def current_bytes(device: torch.device | str = "cpu") -> MemoryReading:
    """Return the memory in use on `device` now."""
    device = torch.device(device)
    if device.type == "cuda":
        return MemoryReading(torch.cuda.memory_allocated(device), "cuda_allocated")
    if device.type == "mps":
        return MemoryReading(torch.mps.driver_allocated_memory(), "mps_driver_allocated")
    return MemoryReading(psutil.Process().memory_info().rss, "process_rss")


def reset_peak(device: torch.device | str = "cpu") -> bool:
    """Reset the peak that `peak_bytes(device)` returns; return False if the system cannot.

    On the CPU this needs Linux and a writable /proc/self/clear_refs (see proc(5), value 5). Where
    it cannot be reset, the peak stays that of the process's whole life.
    """
    device = torch.device(device)
    if device.type == "cuda":
        _taken.pop(device, None)
        torch.cuda.reset_peak_memory_stats(device)
        return True
    if device.type == "mps":
        return False
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def take_peak(device: torch.device) -> int | None:
    """Return the peak bytes on `device` since the last call, or since `reset_peak`.

    Torch's own counter starts afresh, and `peak_bytes` does not. The result is None on a device
    other than a CUDA GPU, whose peak cannot be taken for a short time.
    """
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device)
    _taken[device] = max(peak, _taken.get(device, 0))
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def optimizer_state_bytes(optimizer: Optimizer) -> int:
    """Return the bytes of all tensors in the optimizer's state on this rank.

    The result is 0 before the first step. A tensor that several parameters share, such as
    bitsandbytes' quantile map, counts once. Of a DTensor, only the local shard counts.
    """
    return storage_bytes(chain.from_iterable(map(state_tensors, optimizer.state.values())))


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of the model's parameters and persistent buffers on this rank.

    Tied weights count once. Quantised weights count in their packed size, together with their
    scales.
    """
    return storage_bytes(_weight_tensors(model))


def state_tensors(value: Any) -> Iterator[Tensor]:
    """Yield every tensor inside nested dicts, lists, tuples and plain objects."""
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
        # bitsandbytes keeps a weight's scales in plain attributes of the parameter.
        yield from quantisation_tensors(getattr(parameter, "quant_state", None))
        yield from state_tensors(getattr(parameter, "SCB", None))
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield buffer


def quantisation_tensors(state: Any) -> Iterator[Tensor]:
    """Yield the scales that bitsandbytes keeps for a weight, and the scales of these."""
    while state is not None:
        yield from state_tensors(vars(state))
        state = getattr(state, "state2", None)


def _peak_resident_bytes() -> int:
    # Tried before getrusage, whose ru_maxrss survives exec: a child of a large process inherits it.
    status = _STATUS.read_text() if _STATUS.exists() else ""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    if found:
        return int(found[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # Windows has none

    maxrss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return maxrss if sys.platform == "darwin" else maxrss * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory ran out."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    # The CPU allocator raises a plain RuntimeError.
    return known or "can't allocate memory" in str(error)
