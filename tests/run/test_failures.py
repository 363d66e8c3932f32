"""What an error proposes must work."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from lit_ft.datamodule import InstructionDataModule
from lit_ft.run.failures import choices_that_need_less, remedies_for_out_of_memory
from tests.support.matrix import STRATEGIES, Cell, after, cells, module_and_trainer, refusal

DATA = InstructionDataModule()


def settings_said(cell: Cell) -> str:
    module, trainer = module_and_trainer(cell)
    with (
        pytest.raises(torch.OutOfMemoryError, match="need less memory") as error,
        remedies_for_out_of_memory(module, DATA, trainer),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return str(error.value).partition("need less memory: ")[2]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_choices_that_need_less_memory_are_not_refused(strategy):
    proposed = set()
    for cell in cells():
        if cell.strategy == strategy and refusal(cell) is None:
            for choice in choices_that_need_less(cell.plan):
                # An adapter brings its own optimizer, without GaLore.
                alone = {"optim": "adamw", "galore": "none"} if "adapter" in choice.settings else {}
                other = replace(after(cell, choice), **alone)
                assert other != cell and refusal(other) is None, f"{cell}: {choice}"
                proposed |= choice.settings.items()
    assert (("adapter", "lora") in proposed) == (strategy != "tensor_parallel")


@pytest.mark.parametrize(
    ("cell", "named"),
    [
        (Cell(), ["update=layerwise", "optim=galore_subspace_8bit", "adapter=lora"]),
        (Cell(update="blocks"), ["optim=adamw_8bit"]),
        (Cell(update="layerwise"), ["optim=galore_subspace_8bit", "adapter=lora"]),
        (Cell("adamw_8bit", "online"), ["adapter=lora"]),
        (Cell(adapter="lora"), ["adapter=qlora"]),
        (Cell(adapter="lora", strategy="fsdp"), []),
        (Cell(strategy="fsdp"), ["update=layerwise", "optim=adamw_8bit_torchao"]),
    ],
)
def test_what_would_help_is_named(cell, named):
    found = re.findall(r"\b(?:optim|adapter|update)=\w+", settings_said(cell))
    assert found[: len(named)] == named
    assert bool(found) == bool(named)
