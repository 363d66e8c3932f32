"""The bytes that a rank gives to collectives, counted at torch's dispatcher."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Ledger(TorchDispatchMode):
    """Adds up the bytes of the tensors that this rank gives to collectives, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name() if hasattr(func, "name") else str(func)
        if name.startswith("c10d::"):
            operation = name.removeprefix("c10d::").split(".")[0].strip("_")
            # A gather is given its part; its result is the other argument.
            given = args[1] if "allgather" in operation or "scatter" in operation else args[0]
            tensors = [t for t in tree_leaves(given) if isinstance(t, torch.Tensor)]
            self.bytes[operation] += sum(t.nbytes for t in tensors)
        return func(*args, **(kwargs or {}))
