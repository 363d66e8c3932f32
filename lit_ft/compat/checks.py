"""What does not go together, refused before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lit_ft.distributed import (
    FSDP2Strategy,
    TensorParallelStrategy,
    refuse_not_elementwise,
    refuse_sharded_state,
)
from lit_ft.models import ModelSource
from lit_ft.models.adapters import refuse_sharded_base
from lit_ft.optim import GroupRule

QUANTISED_ARE_NOT_SHARDED = (
    "Quantised weights, as adapter=qlora's, are not sharded: use adapter=lora, that is a model in "
    "full precision, or strategy=ddp."
)


def check_optimizer(
    build: Callable[..., Optimizer],
    schedule: Callable[[Optimizer, float], LRScheduler] | None,
    groups: Sequence[GroupRule],
) -> None:
    """Let the optimizer and the schedule refuse their options, on stand-ins for the parameters.

    Raises:
        MisconfigurationException: With their own message.
    """
    stand_ins = [
        {**rule.options, "params": [torch.nn.Parameter(torch.zeros(2, 2))]} for rule in groups
    ]
    try:
        optimizer = build(stand_ins)
        if schedule and not getattr(optimizer, "sets_own_learning_rate", False):
            schedule(optimizer, 100)
    except (TypeError, ValueError) as error:
        raise MisconfigurationException(f"optim, groups or schedule: {error}") from error


def check_sharding(
    strategy: ModelParallelStrategy,
    *,
    source: ModelSource,
    adapter: Any,
    optimizer: Callable[..., Optimizer],
    compile: bool,
) -> None:
    """Refuse what does not work on a part of the weights.

    Args:
        strategy: Spreads the weights over the ranks.
        source: Of the model.
        adapter: A `peft.PeftConfig` or None.
        optimizer: Its class, or a partial of it; of other functions nothing is known.
        compile: Whether torch.compile runs the model.

    Raises:
        MisconfigurationException: Names what does not go with the strategy, and what does.
    """
    by_columns = isinstance(strategy, TensorParallelStrategy)
    if not isinstance(strategy, FSDP2Strategy | TensorParallelStrategy):
        raise MisconfigurationException(
            "Use lit_ft.distributed.FSDP2Strategy() (strategy=fsdp) in place of "
            "ModelParallelStrategy: it says how the model is sharded."
        )
    kind = getattr(optimizer, "func", optimizer)
    try:
        if isinstance(kind, type):
            (refuse_not_elementwise if by_columns else refuse_sharded_state)(kind)
        if adapter is not None and not by_columns:
            refuse_sharded_base(adapter)
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error
    if adapter is not None and by_columns:
        raise MisconfigurationException(
            "An adapter does not go with strategy=tensor_parallel: use strategy=fsdp, "
            "strategy=ddp, or adapter=none."
        )
    if adapter is not None and getattr(source, "quantization_config", None):
        raise MisconfigurationException(QUANTISED_ARE_NOT_SHARDED)
    if compile:
        raise MisconfigurationException(
            "module.compile=true does not go with sharded weights: leave it out, or use "
            "strategy=ddp."
        )
