"""Show dispatch modes what is inside of custom operations, which are Python code."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

# The operations of bitsandbytes that are Python code on the CPU, and the names of their functions.
_BITSANDBYTES = {
    "optimizer_update_8bit_blockwise": "_optimizer_update_8bit_blockwise_cpu",
    "optimizer_update_32bit": "_optimizer_update_32bit_cpu",
}


class OpenedOperations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs the Python code of custom operations, whose inside no other mode would see.

    It must be entered last, so that it comes first.

    Args:
        device_type: The type of the device that the operations work on.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device_type = device_type

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, or its Python code in place of it."""
        code = _python_code(func, self.device_type)
        return (code or func)(*args, **(kwargs or {}))


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
