"""Follow the memory of all tensors: when it is allocated, what it is for, and when it is freed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

WEIGHTS = "weights"
GRADIENTS = "gradients"
OPTIMIZER = "optimizer"
SUBSPACE = "subspace"
ACTIVATIONS = "activations"
TEMPORARIES = "temporaries"
CATEGORIES = (WEIGHTS, GRADIENTS, OPTIMIZER, SUBSPACE, ACTIVATIONS, TEMPORARIES)

# Given an operation and its arguments, the bytes that its kernel allocates and frees while it runs.
KernelTemporaries = Callable[[Any, tuple[Any, ...], Mapping[str, Any]], int]


@dataclass(frozen=True)
class Place:
    """A part of a run.

    Attributes:
        phase: The phase of the run, such as "forward" or "step".
        step: The optimizer step, counted from 0.
        block: The block of the transformer that computes or is stepped, counted from 0; -1 ahead of
            the first, the number of blocks behind the last, and None if it is not one block.
    """

    phase: str = "load"
    step: int = 0
    block: int | None = None


@dataclass(eq=False)
class Storage:
    """The memory of a tensor, from its allocation to its release.

    Attributes:
        bytes: The bytes that the allocator sets aside.
        place: The part of the run in which it was allocated.
        operation: The operation that allocated it.
        category: The use of it: one of `CATEGORIES`.
        block: The block of the transformer that it belongs to; None for none.
    """

    bytes: int
    place: Place
    operation: str
    category: str = TEMPORARIES
    block: int | None = None


@dataclass(frozen=True)
class Event:
    """An allocation or a release, and the part of the run in which it happens."""

    storage: Storage
    allocates: bool
    place: Place


class MemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every allocation and release of a tensor's memory inside the block.

    It sees the tensors that operations return, real ones and fake ones, on any device. It does not
    see what a kernel allocates and frees while it runs, unless `temporaries` says so.

    Memory counts in multiples of `granule` bytes, as torch's CUDA allocator gives it out. An
    operation of a wrapper subclass (a DTensor, torchao's quantised states) counts through the
    operations on the tensors inside.

    Args:
        granule: The allocator's unit in bytes. Every allocation is rounded up to a multiple of it.
        temporaries: The function that returns the bytes that a kernel allocates for itself; None
            counts none.
    """

    def __init__(self, *, granule: int = 1, temporaries: KernelTemporaries | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.granule = granule
        self.temporaries = temporaries
        self.place = Place()
        self.events: list[Event] = []
        self._storages: dict[int, tuple[Any, Storage]] = {}  # with a weak reference, keyed by id

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, and record what it has allocated."""
        kwargs = kwargs or {}
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # its own operations, on the tensors inside, come next
        if self.place.phase == "step":
            self.place = Place("step", self.place.step, self._block_of(args))
        temporary = self.temporaries(func, args, kwargs) if self.temporaries is not None else 0
        out = func(*args, **kwargs)
        for tensor in [out] if isinstance(out, Tensor) else tree_iter(out):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self._note_new(tensor, args, str(func))
        if temporary:  # at the same time as the result
            storage = Storage(self._rounded(temporary), self.place, str(func))
            self.events += [Event(storage, True, self.place), Event(storage, False, self.place)]
        return out

    def __enter__(self) -> Self:
        """Begin to record."""
        resize = torch.UntypedStorage.resize_

        def noted_resize(memory: torch.UntypedStorage, size: int) -> None:
            # FSDP2 frees gathered weights in this way, which is no operation.
            resize(memory, size)
            if id(memory) in self._storages:
                self._note_memory(memory, "resize_")

        self._patch = patch.object(torch.UntypedStorage, "resize_", noted_resize)
        self._patch.start()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop recording."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._patch.stop()

    def mark(self, tensors: Iterable[Tensor], category: str, *, block: int | None = None) -> None:
        """Say what tensors are for; those that existed before the block are recorded now."""
        for tensor in tensors:
            storage = self._note(tensor, "")
            storage.category = category
            if block is not None:
                storage.block = block

    def _note_new(self, tensor: Tensor, args: Any, operation: str) -> None:
        """Record what an operation returns, unless it is a view of what was there before."""
        memory = tensor.untyped_storage()
        if id(memory) in self._storages or not any(
            isinstance(one, Tensor) and one.untyped_storage() is memory for one in args
        ):
            self._note(tensor, operation)

    def _note(self, tensor: Tensor, operation: str) -> Storage:
        return self._note_memory(tensor.untyped_storage(), operation)

    def _note_memory(self, memory: torch.UntypedStorage, operation: str) -> Storage:
        size, key = self._rounded(memory.nbytes()), id(memory)
        _, storage = self._storages.get(key, (None, None))
        if storage is not None and storage.bytes == size:
            return storage
        self._release(key)
        storage = Storage(size, self.place, operation)
        if self.place.phase == "backward" and torch.is_grad_enabled():
            storage.category = ACTIVATIONS  # recomputed
        self._storages[key] = weakref.ref(memory, lambda _: self._release(key)), storage
        self.events.append(Event(storage, True, self.place))
        return storage

    def _release(self, key: int) -> None:
        _, storage = self._storages.pop(key, (None, None))
        if storage is not None:
            self.events.append(Event(storage, False, self.place))

    def _block_of(self, args: Any) -> int | None:
        """Return the block that all of an operation's tensors belong to; None if there are more."""
        found = set()
        for argument in tree_iter(args):
            if isinstance(argument, Tensor):
                known = self._storages.get(id(argument.untyped_storage()))
                if known is not None and known[1].block is not None:
                    found.add(known[1].block)
        return found.pop() if len(found) == 1 else None

    def _rounded(self, size: int) -> int:
        return -(-size // self.granule) * self.granule
