"""Run code on fake tensors, which have a shape and a device and no memory.

Everything that only moves tensors runs unchanged. A host that reads a tensor gets its value if it
follows from integers that are known, such as token ids, labels and masks. Of a single
floating-point number it reads 1, so that checks for NaN and infinity pass.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, wraps
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_iter, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

_DEVICE, _META = torch.ops.prim.device.default, torch.device("meta")
_HISTOGRAM = torch.ops.aten.histc.default
_READ = torch.ops.aten._local_scalar_dense.default
_CONSTANTS = {
    torch.ops.aten.arange.default,
    torch.ops.aten.arange.start,
    torch.ops.aten.arange.start_step,
    torch.ops.aten.full.default,
    torch.ops.aten.ones.default,
    torch.ops.aten.scalar_tensor.default,
    torch.ops.aten.zeros.default,
}
# The operations of bitsandbytes that are Python code on the CPU, and the names of their functions.
_BITSANDBYTES = {
    "optimizer_update_8bit_blockwise": "_optimizer_update_8bit_blockwise_cpu",
    "optimizer_update_32bit": "_optimizer_update_32bit_cpu",
}


class DependsOnData(RuntimeError):
    """Raised if the shape of a tensor depends on the values of floating-point tensors."""


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
        # A mesh reads its ranks from a tensor, and sharding is tried on whole tensors.
        for owner, name in (
            (DeviceMesh, "__getitem__"),
            (ShardingPropagator, "_propagate_tensor_meta_non_cached"),
        ):
            own = without_fakes(getattr(owner, name))
            modes.enter_context(patch.object(owner, name, own))
        modes.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        modes.enter_context(_KnownValues())
        modes.enter_context(watcher)
        modes.enter_context(_Opened(device_type))  # last, and so it comes first
        if device_type != "cpu":
            modes.enter_context(_disguised(device_type))
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


def _swapped(old: Any, new: Any) -> None:
    """Give `old` the dtype and memory of `new`, as `torch.utils.swap_tensors` does.

    Torch's own function refuses if there are weak references to a tensor, and fake tensors have
    them.
    """
    if old.dtype != new.dtype or old.device != new.device:
        torch._C._swap_tensor_impl(old, new)
        old.__dict__, new.__dict__ = new.__dict__, old.__dict__


class _Opened(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs the Python code of custom operations, whose inside no other mode would see."""

    def __init__(self, device_type: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device_type = device_type

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _DEVICE:  # torch asks more often than it computes
            own: Any = args[0]
            return _META if own.fake_mode.in_kernel_invocation else own.fake_device
        code = _python_code(func, self.device_type)
        return (code or func)(*args, **(kwargs or {}))


@contextmanager
def _disguised(device_type: str) -> Iterator[None]:
    """Let Python code find fake tensors on another device than torch's own code does.

    Torch cannot record gradients on a device that it is not built for, so the tensors are on the
    CPU. Code outside of torch's operations sees `device_type`.
    """
    shown, own, generator = torch.device(device_type, 0), FakeTensor.device, torch.Generator
    modes = torch._C._len_torch_dispatch_stack()

    def device(self: FakeTensor) -> torch.device:
        # A mode is off the stack while it handles an operation; `_Opened` also while it runs code.
        outside = torch._C._len_torch_dispatch_stack() >= modes - 1
        return shown if outside and self.fake_device.type == "cpu" else own.__get__(self)

    is_autocast, autocast_dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
    with ExitStack() as patches:
        for target, name, replaced in (
            (FakeTensor, "device", property(device)),
            (FakeTensor, "is_cuda", property(lambda self: device(self).type == device_type)),
            (LinearCrossEntropyOptions, "_resolve_auto_acc_dtype", staticmethod(_sum_dtype)),
            (torch.cuda, "synchronize", lambda *_: None),
            (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
            (torch, "Generator", lambda *_, **__: generator()),
            (torch, "is_autocast_enabled", lambda *_: is_autocast("cpu")),
            (torch, "get_autocast_dtype", lambda *_: autocast_dtype("cpu")),
        ):
            patches.enter_context(patch.object(target, name, replaced, create=True))
        patches.enter_context(_OnTheCPU(shown.type))
        yield


def _sum_dtype(dtype: torch.dtype, *_: Any) -> torch.dtype | None:
    """Return the dtype in which torch sums the logits of 16-bit numbers on a GPU."""
    return torch.float32 if dtype.itemsize == 2 else None


class _OnTheCPU(TorchFunctionMode):
    """Puts on the CPU what code asks for on another device."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args = tuple(self._moved(value) for value in args)
        return func(*args, **{key: self._moved(value) for key, value in (kwargs or {}).items()})

    def _moved(self, value: Any) -> Any:
        if isinstance(value, torch.device) and value.type == self.device_type:
            return torch.device("cpu")
        return value


@cache
def _python_code(func: Any, device_type: str) -> Callable[..., Any] | None:
    """Return the Python function that computes a custom operation; None if it is a kernel."""
    if func.namespace == "torch_nn":
        code: Callable[..., Any] = OPDEFS[func.name().partition(".")[0]]._init_fn
        return code
    if func.namespace == "bitsandbytes" and device_type == "cpu":
        kernels: Any = importlib.import_module("bitsandbytes.backends.cpu.ops")
        return getattr(kernels, _BITSANDBYTES.get(func.name().partition("::")[2], ""), None)
    return None


def _may_be_read(tensor: Tensor) -> bool:
    """Whether code may ask for a tensor's values: it holds ids, labels, masks or places."""
    return not (tensor.dtype.is_floating_point or tensor.is_complex()) and tensor.numel() < 2**24


class _KnownValues(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the values of integers and Booleans that follow from known ones."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._values: Any = WeakTensorKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented
        kwargs = kwargs or {}
        if func is _READ:
            return self._read(args[0])
        if func is _HISTOGRAM:  # torch counts integers on a GPU alone
            return torch.empty(args[1], dtype=args[0].dtype)
        if kwargs.get("device") is not None and kwargs["device"].type != "meta":
            kwargs["device"] = torch.device("cpu")
        finds_shape = torch.Tag.dynamic_output_shape in func.tags
        out = None if finds_shape else func(*args, **kwargs)
        made = [one for one in tree_iter(out) if isinstance(one, FakeTensor)]
        if not finds_shape and not any(map(_may_be_read, made)):
            return out
        flat, structure = tree_flatten((args, kwargs))
        tensors = [value for value in flat if isinstance(value, Tensor)]
        known = all(self._value(tensor) is not None for tensor in tensors)
        if not known or (not tensors and func not in _CONSTANTS):
            return func(*args, **kwargs) if finds_shape else out
        values = [self._value(v) if isinstance(v, Tensor) else v for v in flat]
        with _disable_current_modes():
            real_args, real_kwargs = tree_unflatten(values, structure)
            results = func(*real_args, **real_kwargs)
        if finds_shape:
            out = torch.empty(results.shape, dtype=results.dtype)
        for fake, real in zip(tree_iter(out), tree_iter(results), strict=True):
            if isinstance(fake, FakeTensor) and _may_be_read(fake):
                self._values[fake] = real
        return out

    def _value(self, tensor: Tensor) -> Tensor | None:
        """Return a tensor with the values of `tensor`; None if they are not known."""
        if type(tensor) is not FakeTensor:
            return tensor
        if tensor.dtype.is_floating_point and tensor.numel() == 1:
            with _disable_current_modes():
                return torch.ones(tensor.shape, dtype=tensor.dtype)
        value: Tensor | None = self._values.get(tensor)
        return value

    def _read(self, tensor: Tensor) -> Any:
        value = self._value(tensor)
        if value is None:
            raise DependsOnData("the code reads a value that depends on other values")
        with _disable_current_modes():
            return value.item()
