"""lit_ft: a LightningModule and callbacks that fine-tune causal language models on few GPUs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_ft.datamodule import InstructionDataModule
    from lit_ft.module import CausalLMModule

__all__ = ["CausalLMModule", "InstructionDataModule"]

_HOMES = {
    "CausalLMModule": "lit_ft.module",
    "InstructionDataModule": "lit_ft.datamodule",
}


def __getattr__(name: str) -> Any:
    # On demand: `import lit_ft.optim` should not cost the seconds that lightning and peft take.
    if name not in _HOMES:
        raise AttributeError(f"module 'lit_ft' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
