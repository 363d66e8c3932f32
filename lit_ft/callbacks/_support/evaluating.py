"""Look at a model in the middle of its training, and leave no trace."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lit_ft.tensors.sharding import fsdp_root, is_model_sharded

_SHARDED = (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)


def sharded_by(trainer: Trainer, model: Any) -> str | None:
    """Return why the model cannot be called outside of a step; None if it can.

    FSDP1 and DeepSpeed hold the weights in a wrapper around the module.
    """
    if isinstance(trainer.strategy, _SHARDED) and not is_model_sharded(model):
        return f"the model is sharded by {type(trainer.strategy).__name__}"
    return None


def why_not_evaluated(trainer: Trainer, module: Any) -> str | None:
    """Return why a module's model and tokenizer cannot be used after a step; None if they can."""
    model = getattr(module, "model", None)
    if model is None or getattr(module, "tokenizer", None) is None:
        return f"{type(module).__name__} has no `model` and `tokenizer`"
    return sharded_by(trainer, model)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Set eval mode without gradients in the block, then restore modes and the random state.

    The mode of each module is restored by itself, since some may be in eval mode during training. A
    sharded model gives back the memory of its whole weights, as a backward pass would do. A
    compiled one runs as it is written: otherwise every new length would be compiled for a single
    use.

    Args:
        model: The model.
    """
    with ExitStack() as stack:
        stack.enter_context(isolate_rng())
        stack.enter_context(_eval_mode(model))
        stack.enter_context(torch.no_grad())
        if (root := fsdp_root(model)) is not None:
            stack.callback(root.reshard)
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
