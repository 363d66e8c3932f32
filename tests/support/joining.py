"""A module as it is when Lightning asks it for its model: its trainer has joined the ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import distributed as dist
from torch.optim import AdamW

from lit_ft import CausalLMModule
from tests.support.tiny_module import trainer_of


def joined(source: Any, *, strategy: Any = None, **options: Any) -> CausalLMModule:
    """Return a module without its model; with a strategy, one of all ranks."""
    module = CausalLMModule(source, optimizer=partial(AdamW, lr=1e-3), **options)
    spread = {"strategy": strategy, "devices": dist.get_world_size()} if strategy else {}
    module.trainer = trainer_of(".", **spread)
    module.trainer.strategy._lightning_module = module
    module.trainer.strategy.setup_environment()
    return module
