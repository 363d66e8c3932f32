"""Follow the memory of all tensors: when it is allocated, what it is for, and when it is freed."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Self
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lit_ft.measure.call_stack import Stack, calling_stack
from lit_ft.measure.storage_bytes import is_wrapper

WEIGHTS = "weights"
GRADIENTS = "gradients"
OPTIMIZER = "optimizer"
SUBSPACE = "subspace"
ACTIVATIONS = "activations"
TEMPORARIES = "temporaries"
CATEGORIES = (WEIGHTS, GRADIENTS, OPTIMIZER, SUBSPACE, ACTIVATIONS, TEMPORARIES)
USES = {one: one for one in CATEGORIES} | {OPTIMIZER: "optimizer state", SUBSPACE: "subspaces"}
"""The words for the categories, keyed by category."""

_ADD = torch.ops.aten.add.Tensor
# Functions of these modules are between an operation and a `__torch_dispatch__`.
_BETWEEN = ("torch._compile", "torch._dynamo.eval_frame", "torch._ops")

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
    """An allocation or a release, and the part of the run in which it happens.

    Attributes:
        storage: The memory.
        allocates: Whether it is an allocation.
        place: The part of the run.
        stack: The Python functions that have allocated it, if the tracker keeps them.
    """

    storage: Storage
    allocates: bool
    place: Place
    stack: Stack = ()


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
        device_type: The type of the device whose memory counts; None counts all but "meta".
        keeps_stacks: Whether each allocation keeps the Python functions that have called it, which
            takes time.
    """

    def __init__(
        self,
        *,
        granule: int = 1,
        temporaries: KernelTemporaries | None = None,
        device_type: str | None = None,
        keeps_stacks: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.granule = granule
        self.temporaries = temporaries
        self.device_type = device_type
        self.keeps_stacks = keeps_stacks
        self.place = Place()
        self.events: list[Event] = []
        self._storages: dict[int, tuple[Any, Storage]] = {}  # with a weak reference, keyed by id

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, and record what it has allocated."""
        kwargs = kwargs or {}
        if any(map(is_wrapper, types)):
            return NotImplemented  # its own operations, on the tensors inside, come next
        if self.place.phase == "step":
            self.place = Place("step", self.place.step, self._block_of(args))
        temporary = self.temporaries(func, args, kwargs) if self.temporaries is not None else 0
        reused = args[0].untyped_storage() if _adds_up_in_place(func, args) else None
        out = func(*args, **kwargs)
        if reused is not None:
            self._move(reused, out.untyped_storage())
        for tensor in [out] if isinstance(out, Tensor) else tree_iter(out):
            if self._counts(tensor):
                self._note_new(tensor, args, _name_of(func))
        if temporary:  # at the same time as the result
            storage = Storage(self._rounded(temporary), self.place, _name_of(func))
            self.events += [self._begin(storage), Event(storage, False, self.place)]
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
        for tensor in filter(self._counts, tensors):
            storage = self._note(tensor, "")
            storage.category = category
            if block is not None:
                storage.block = block

    def _note_new(self, tensor: Tensor, args: Any, operation: str) -> None:
        """Record what an operation returns, unless it is a view of what was there before."""
        memory = tensor.untyped_storage()
        if id(memory) in self._storages or not any(
            self._counts(one) and one.untyped_storage() is memory for one in args
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
        self.events.append(self._begin(storage))
        return storage

    def _begin(self, storage: Storage) -> Event:
        stack = calling_stack() if self.keeps_stacks else ()
        return Event(storage, True, self.place, stack)

    def _move(self, old: torch.UntypedStorage, new: torch.UntypedStorage) -> None:
        """Let `new` be the memory that `old` has been."""
        known, key = self._storages.pop(id(old), None), id(new)
        if known is not None:
            self._storages[key] = weakref.ref(new, lambda _: self._release(key)), known[1]

    def _release(self, key: int) -> None:
        _, storage = self._storages.pop(key, (None, None))
        if storage is not None:
            self.events.append(Event(storage, False, self.place))

    def _block_of(self, args: Any) -> int | None:
        """Return the block that all of an operation's tensors belong to; None if there are more."""
        found = set()
        for argument in tree_iter(args):
            if self._counts(argument):
                known = self._storages.get(id(argument.untyped_storage()))
                if known is not None and known[1].block is not None:
                    found.add(known[1].block)
        return found.pop() if len(found) == 1 else None

    def _counts(self, value: Any) -> bool:
        """Return whether a value is a tensor with memory of its own that counts."""
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            return False  # the parts of a sparse tensor are tensors themselves
        kind = value.device.type
        return kind != "meta" if self.device_type is None else kind == self.device_type

    def _rounded(self, size: int) -> int:
        return -(-size // self.granule) * self.granule


@cache
def _name_of(func: Any) -> str:
    return str(func)


def _adds_up_in_place(func: Any, args: Any) -> bool:
    """Return whether autograd would add this gradient to another one in the memory of that one.

    It does so if nothing else holds that memory (`accumulate` in
    torch/csrc/autograd/input_buffer.cpp), but not while a dispatch mode is active.
    """
    if func is not _ADD or torch.is_grad_enabled() or not isinstance(args[1], Tensor):
        return False
    if {args[0].layout, args[1].layout} != {torch.strided}:
        return False
    memory = args[0].untyped_storage()
    return (
        _caller() == "_engine_run_backward"
        and memory.nbytes() == args[0].nbytes == args[1].nbytes
        and torch._C._storage_Use_Count(memory._cdata) == 2  # the gradient and `memory`
    )


def _caller() -> str:
    """Return the name of the Python function that has called the operation that is dispatched."""
    frame = inspect.currentframe()
    while frame is not None and (
        frame.f_globals.get("__name__") in (__name__, *_BETWEEN)
        or frame.f_code.co_name == "__torch_dispatch__"
    ):
        frame = frame.f_back
    return "" if frame is None else frame.f_code.co_name
