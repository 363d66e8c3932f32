"""What an error proposes must work."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from lit_ft.datamodule import InstructionDataModule
from lit_ft.run.failures import remedies_for_out_of_memory
from tests.support_matrix import STRATEGIES, Cell, cells, module_and_trainer, refusal

DATA = InstructionDataModule()
SETTING = r"\b(optim|adapter|update)=(\w+(?: galore=\w+)?)"


def settings_said(cell: Cell) -> str:
    module, trainer = module_and_trainer(cell)
    with (
        pytest.raises(torch.OutOfMemoryError, match="need less memory") as error,
        remedies_for_out_of_memory(module, DATA, trainer),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return str(error.value).partition("need less memory: ")[2]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_settings_that_need_less_memory_are_not_refused(strategy):
    proposed = set()
    for cell in cells():
        plain = (cell.accumulate, cell.adapter in ("none", "lora"), cell.clip != "value")
        if cell.strategy == strategy and plain == (1, True, True) and refusal(cell) is None:
            for group, choice in re.findall(SETTING, settings_said(cell)):
                # An adapter brings its own optimizer.
                optim = {"optim": "adamw"} if group == "adapter" else {}
                other = replace(cell, **{group: choice}, **optim)
                assert other != cell and refusal(other) is None, f"{cell}: {group}={choice}"
                proposed.add(choice)
    assert ("lora" in proposed) == (strategy != "tensor_parallel")


@pytest.mark.parametrize(
    ("cell", "named"),
    [
        (Cell(), ["update=layerwise", "optim=galore_subspace_8bit", "adapter=lora"]),
        (Cell(update="layerwise"), ["optim=galore_subspace_8bit", "adapter=lora"]),
        (Cell("galore_subspace_8bit"), ["adapter=lora"]),
        (Cell(adapter="lora"), ["adapter=qlora"]),
        (Cell(adapter="lora", strategy="fsdp"), []),
        (Cell(strategy="fsdp"), ["update=layerwise", "optim=adamw_8bit_torchao galore=online"]),
    ],
)
def test_what_would_help_is_named(cell, named):
    found = ["=".join(setting) for setting in re.findall(SETTING, settings_said(cell))]
    assert found[: len(named)] == named
    assert bool(found) == bool(named)
