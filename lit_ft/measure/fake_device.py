"""Let Python code find fake tensors on a GPU that is not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions
from torch.overrides import TorchFunctionMode


@contextmanager
def disguised(device_type: str) -> Iterator[None]:
    """Let Python code find fake tensors on another device than torch's own code does.

    Torch cannot record gradients on a device that it is not built for, so the tensors are on the
    CPU. Code outside of torch's operations sees `device_type`.
    """
    shown, own_device = torch.device(device_type, 0), torch.device("cpu")
    own, generator = FakeTensor.device, torch.Generator
    modes = torch._C._len_torch_dispatch_stack()

    def device(self: FakeTensor) -> torch.device:
        # A mode is off the stack while it handles an operation, and the outermost one also while
        # it runs the Python code of one.
        outside = torch._C._len_torch_dispatch_stack() >= modes - 1
        return shown if outside and self.fake_device.type == "cpu" else own.__get__(self)

    is_autocast, autocast_dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
    wrapper = torch.Tensor._make_wrapper_subclass

    def on_cpu(*args: Any, **options: Any) -> Any:
        """Return a wrapper, such as torchao's quantised state, on the device of its parts."""
        if getattr(options.get("device"), "type", None) == shown.type:
            options["device"] = own_device
        return wrapper(*args, **options)

    with ExitStack() as patches:
        for target, name, replaced in (
            (FakeTensor, "device", property(device)),
            (torch.Tensor, "_make_wrapper_subclass", staticmethod(on_cpu)),
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
