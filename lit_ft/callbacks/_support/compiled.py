"""Tell whether a module is compiled."""

from __future__ import annotations

from lightning.pytorch import LightningModule


def is_compiled(module: LightningModule) -> bool:
    """Return whether torch.compile runs the module or a part of it. Torch has no public flag."""
    return module._compiler_ctx is not None or any(
        part._compiled_call_impl is not None or hasattr(part, "_orig_mod")
        for part in module.modules()
    )
