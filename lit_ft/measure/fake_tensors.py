"""Run code on fake tensors, which have a shape and a device and no memory.

Everything that only moves tensors runs unchanged. A host that reads a tensor gets its value if it
follows from integers that are known, such as token ids, labels and masks. Of a single
floating-point number it reads 1, so that checks for NaN and infinity pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from lit_ft.measure.fake_device import disguised
from lit_ft.measure.known_values import DependsOnData, KnownValues
from lit_ft.measure.opened_operations import OpenedOperations

_DEVICE, _META = torch.ops.prim.device.default, torch.device("meta")


@contextmanager
def fake_tensors(watcher: TorchDispatchMode, *, device_type: str = "cpu") -> Iterator[None]:
    """Make every new tensor inside the block a fake one.

    Args:
        watcher: The mode that sees each operation on fake tensors, those inside of custom
            operations too.
        device_type: The device on which Python code believes fake tensors to be: "cpu", or "cuda"
            even where torch is built without it. Torch's own code has them on the CPU.

    Raises:
        DependsOnData: If the code inside asks for values that fake tensors do not have.
    """
    # transformers takes a fake tensor for a sign that a model is being compiled, and would not
    # leave out a mask that masks nothing.
    not_tracing = patch("transformers.masking_utils.is_tracing", lambda *_: False)
    with ExitStack() as modes:
        modes.enter_context(not_tracing)
        modes.enter_context(patch("torch.utils.swap_tensors", _swapped))
        modes.enter_context(patch.object(FakeTensor, "__deepcopy__", _copied, create=True))
        # A mesh reads its ranks from a tensor, and sharding is tried on whole tensors.
        for owner, name in (
            (DeviceMesh, "__getitem__"),
            (ShardingPropagator, "_propagate_tensor_meta_non_cached"),
        ):
            own = without_fakes(getattr(owner, name))
            modes.enter_context(patch.object(owner, name, own))
        modes.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        modes.enter_context(KnownValues())
        modes.enter_context(watcher)
        modes.enter_context(_Opened(device_type))  # last, and so it comes first
        if device_type != "cpu":
            modes.enter_context(disguised(device_type))
        try:
            yield
        except (DynamicOutputShapeException, DataDependentOutputException) as error:
            raise DependsOnData(f"the result of {error.func} depends on values") from error


def without_fakes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` so that it makes real tensors, even inside of `fake_tensors`."""

    @wraps(function)
    def real(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return real


def _copied(tensor: FakeTensor, memo: dict[int, Any]) -> Any:
    """Return a deep copy. Torch's own function would copy memory that is not there."""
    return memo.setdefault(id(tensor), tensor.detach().clone())


def _swapped(old: Any, new: Any) -> None:
    """Give `old` the dtype and memory of `new`, as `torch.utils.swap_tensors` does.

    Torch's own function refuses if there are weak references to a tensor, and fake tensors have
    them.
    """
    if old.dtype != new.dtype or old.device != new.device:
        torch._C._swap_tensor_impl(old, new)
        old.__dict__, new.__dict__ = new.__dict__, old.__dict__


class _Opened(OpenedOperations):  # type: ignore[no-untyped-call]
    """Runs the Python code of custom operations, and says which device fake tensors are on."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _DEVICE:  # torch asks more often than it computes
            own: Any = args[0]
            return _META if own.fake_mode.in_kernel_invocation else own.fake_device
        return super().__torch_dispatch__(func, types, args, kwargs)
