"""Step any optimizer on a few of its parameters, as if the others did not exist."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.optim import Optimizer


@contextmanager
def narrowed(optimizer: Optimizer, *parameters: Tensor) -> Iterator[None]:
    """Let `optimizer.step()` inside the block touch `parameters` only.

    Each group keeps its options, and holds only those of its parameters that are in `parameters`.
    The state stays where it is. If the optimizer counts its steps for each parameter, one narrowed
    step per parameter equals one whole step bit for bit. An optimizer that counts steps in its
    groups, as schedule-free optimizers do, would instead count every narrowed step.

    Args:
        optimizer: The torch optimizer to narrow.
        *parameters: The parameters of `optimizer` to step. If there are none, a step does nothing.

    Raises:
        ValueError: If a parameter is not in the optimizer, or if the optimizer is one of
            bitsandbytes' and has overrides by module.
    """
    kept = {id(parameter) for parameter in parameters}
    groups = list(optimizer.param_groups)
    whole = [group["params"] for group in groups]
    narrow = [[parameter for parameter in params if id(parameter) in kept] for params in whole]
    if sum(map(len, narrow)) != len(kept):
        missing = kept - {id(parameter) for params in whole for parameter in params}
        shapes = [tuple(parameter.shape) for parameter in parameters if id(parameter) in missing]
        raise ValueError(
            f"{type(optimizer).__name__} does not hold the parameters of shape "
            f"{', '.join(map(str, shapes))}: narrow it to parameters of its own groups."
        )
    _initialise(optimizer)
    try:
        for group, params in zip(groups, narrow, strict=True):
            group["params"] = params
        yield
    finally:
        for group, params in zip(groups, whole, strict=True):
            group["params"] = params


def _initialise(optimizer: Optimizer) -> None:
    # bitsandbytes would do this in its first step, but only for the parameters that it sees there.
    if getattr(optimizer, "initialized", True) or not hasattr(optimizer, "check_overrides"):
        return
    optimizer.check_overrides()
    if optimizer.mng.index2config:  # type: ignore[attr-defined]
        raise ValueError(
            "bitsandbytes' overrides by module (StableEmbedding, GlobalOptimManager) depend on a "
            f"parameter's position in {type(optimizer).__name__}, which steps one parameter at a "
            "time here (layerwise, or for bfloat16 weights): step float32 weights after backward, "
            "or use no override."
        )
    optimizer.to_gpu()  # type: ignore[attr-defined]
    optimizer.initialized = True  # type: ignore[attr-defined]
