"""Keep the values of fake tensors that code may ask for: ids, labels, masks and counts."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_iter, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from lit_ft.measure.storage_bytes import is_wrapper

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


class DependsOnData(RuntimeError):
    """Raised if the shape of a tensor depends on the values of floating-point tensors."""


class KnownValues(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the values of integers and Booleans that follow from known ones.

    Of a floating-point number that is alone in its tensor, code reads 1.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._values: Any = WeakTensorKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(map(is_wrapper, types)):
            return NotImplemented
        kwargs = kwargs or {}
        if func is _READ:
            return self._read(args[0])
        if func is _HISTOGRAM:  # torch counts integers on a GPU alone
            return torch.empty(args[1], dtype=args[0].dtype)
        if kwargs.get("device") is not None and kwargs["device"].type != "meta":
            kwargs["device"] = torch.device("cpu")
        finds_shape = _finds_shape(func)
        out = None if finds_shape else func(*args, **kwargs)
        made = [out] if type(out) is FakeTensor else tree_iter(out)
        if not finds_shape and not any(_may_be_read(x) for x in made if isinstance(x, FakeTensor)):
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


@cache
def _finds_shape(func: Any) -> bool:
    return torch.Tag.dynamic_output_shape in func.tags


def _may_be_read(tensor: Tensor) -> bool:
    """Whether code may ask for a tensor's values: it holds ids, labels, masks or places."""
    return not (tensor.dtype.is_floating_point or tensor.is_complex()) and tensor.numel() < 2**24
