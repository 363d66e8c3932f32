"""Which tensors come into being, and how much memory they take at once."""

from __future__ import annotations

import ctypes
import gc
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from lit_ft.measure.storage_bytes import storage_bytes


class _Outputs(TorchDispatchMode):
    """Shows each tensor that an operation gives out to `see`."""

    def see(self, func: Any, tensor: torch.Tensor) -> None:
        raise NotImplementedError

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.see(func, tensor)
        return out


class NewTensors(_Outputs):
    """Collects (operation, shape) of the new tensors that have one of `shapes`.

    A view of a tensor in `known` is not new.
    """

    def __init__(self, shapes: Iterable[tuple[int, ...]], known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.shapes = set(shapes)
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.found: set[tuple[str, tuple[int, ...]]] = set()

    def see(self, func: Any, tensor: torch.Tensor) -> None:
        if tuple(tensor.shape) in self.shapes:
            storage = tensor.untyped_storage().data_ptr()
            if storage and storage not in self.known:
                self.found.add((str(func), tuple(tensor.shape)))


class LargestTensor(_Outputs):
    """Keeps the number of elements of the largest tensor that an operation gives out."""

    numel = 0

    def see(self, func: Any, tensor: torch.Tensor) -> None:
        self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.itemsize)


class PeakAllocated:
    """The most bytes at once that torch allocates on the CPU inside the block.

    Counted from what was allocated before, by torch's own allocator: temporaries of operations
    are in it, what was there before is not.
    """

    def __enter__(self) -> PeakAllocated:
        gc.collect()  # what an earlier test has left would be freed inside of the block
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self._profile.__exit__(*args)
        assert self._profile.profiler is not None
        events = self._profile.profiler.kineto_results.events()
        memory = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
        self.bytes = max(accumulate(event.nbytes() for event in memory), default=0)


def peak_allocated(function: Callable[[], object]) -> int:
    """Run `function` and return the most bytes that it had allocated at once."""
    with PeakAllocated() as peak:
        function()
    return peak.bytes


def live_bytes() -> int:
    """Return the bytes of all tensors that Python holds now."""
    gc.collect()
    return storage_bytes(t for t in gc.get_objects() if issubclass(type(t), torch.Tensor))


def own_bytes() -> int:
    """What this process has in memory and shares with nobody: no files that are mapped."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])


@contextmanager
def watched() -> Iterator[list[int]]:
    """Give a list that holds, at the end, the most bytes that this process has taken meanwhile."""
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 65536)  # M_MMAP_THRESHOLD: what is freed is given back
    libc.malloc_trim(0)  # and what was freed before, or it would be taken again unseen
    before, most, done = own_bytes(), [0], threading.Event()

    def look() -> None:
        most[0] = max(most[0], own_bytes() - before)

    def watch() -> None:
        while not done.wait(0.001):
            look()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        done.set()
        watcher.join()
        look()
