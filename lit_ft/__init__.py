"""lit_ft: a LightningModule and callbacks that fine-tune causal language models on few GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_ft.before_libraries import prepare_own_command

prepare_own_command()

from lit_ft.compat.lazy import on_demand  # noqa: E402

if TYPE_CHECKING:
    from lit_ft.datamodule import InstructionDataModule
    from lit_ft.module import CausalLMModule

__all__ = ["CausalLMModule", "InstructionDataModule"]

__getattr__ = on_demand(
    __name__,
    {
        "CausalLMModule": "lit_ft.module",
        "InstructionDataModule": "lit_ft.datamodule",
    },
)
