"""Which tensors come into being, and how much memory they take at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode


class NewTensors(TorchDispatchMode):
    """Collects (operation, shape) of the new tensors that have one of `shapes`.

    A view of a tensor in `known` is not new.
    """

    def __init__(self, shapes: Iterable[tuple[int, ...]], known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.shapes = set(shapes)
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.found: set[tuple[str, tuple[int, ...]]] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tuple(tensor.shape) in self.shapes:
                storage = tensor.untyped_storage().data_ptr()
                if storage and storage not in self.known:
                    self.found.add((str(func), tuple(tensor.shape)))
        return out


def peak_allocated(function: Callable[[], object]) -> int:
    """Run `function` and return the most bytes that torch had allocated on the CPU at once.

    Counted from what was allocated before, by torch's own allocator: temporaries of operations
    are in it, what was there before is not.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    assert recorded.profiler is not None
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(accumulate(changes), default=0)
