"""An optimizer that steps matrices by a rule of its own, and everything else with AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.optimizer import ParamsT

from lit_ft.tensors.sharding import added_over_ranks, holds_whole_rows, local

SMALLEST = 1e-8
"""The smallest norm of gradients to divide by: what is smaller is left small."""
_TOGETHER = 2**26  # elements of the matrices that are stepped together

Matrices = list[tuple[Tensor, dict[str, Any]]]
"""Parameters that have a gradient, each with its group."""


class MatrixOptimizer(Optimizer):
    """The base of optimizers whose rule is for matrices; torch's AdamW steps everything else.

    AdamW steps the parameters of fewer than two dimensions, and all parameters of the groups with
    `use_adamw: True`. A parameter of more than two dimensions is a stack of matrices [..., m, n].
    Both rules work on this optimizer's own groups and state, so schedulers, checkpoints and
    narrowed steps see one optimizer.

    Subclasses implement `_step_matrices`.

    Args:
        params: The parameters to step, as tensors, named tensors or groups.
        lr: The learning rate.
        weight_decay: The decoupled weight decay, which is multiplied by the learning rate.
        betas: The decay rates of the first and second moments.
        eps: The number added to the square root of the second moment.
        fused: Whether to use torch's fused AdamW; None lets torch decide.
        **options: The defaults of the subclass's own options.

    Raises:
        ValueError: If the learning rate or the weight decay is negative, or, while stepping, if a
            matrix is sharded by its columns.
        RuntimeError: While stepping, if a gradient is sparse.
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        fused: bool | None,
        **options: Any,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}={value}: give a finite number of at least 0.")
        shared = {"lr": lr, "weight_decay": weight_decay, "betas": tuple(betas), "eps": eps}
        super().__init__(params, {**shared, "fused": fused, "use_adamw": False, **options})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient; return the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        matrices: Matrices = []
        others: list[dict[str, Any]] = []
        for group in self.param_groups:
            rest = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.ndim < 2 or group["use_adamw"]:
                    rest.append(parameter)
                else:
                    matrices.append((parameter, group))
            if rest:
                options = {key: group[key] for key in ("lr", "weight_decay", "betas", "eps")}
                others.append({**options, "fused": group["fused"], "params": rest})
        for part in _by_size(matrices):
            self._step_matrices(part)
        if others:
            adamw = AdamW(others)
            adamw.state = self.state
            adamw.step()
        return loss

    @contextmanager
    def rows_apart(self, parameter: Tensor, group: dict[str, Any]) -> Iterator[bool]:
        """Prepare to step a parameter a few rows at a time, in the block.

        Args:
            parameter: The parameter, which has the gradient of all rows.
            group: The group of the parameter.

        Yields:
            Whether some rows can be stepped without the others.
        """
        held_gradient_of(parameter)  # it may be sparse, which has no rows to take
        yield parameter.ndim < 2 or group["use_adamw"]

    def _step_matrices(self, matrices: Matrices) -> None:
        """Step a few parameters, each with at least two dimensions.

        If they are sharded, what ranks must tell each other about them goes in few messages.
        """
        raise NotImplementedError


def gradient_of(parameter: Tensor) -> Tensor:
    """Return this rank's part of the gradient, in float32 or wider; see `held_gradient_of`."""
    gradient = held_gradient_of(parameter)
    return gradient.float() if gradient.itemsize < 4 else gradient


def held_gradient_of(parameter: Tensor) -> Tensor:
    """Return this rank's part of the gradient.

    Raises:
        ValueError: If the parameter is sharded by its columns.
        RuntimeError: If the gradient is sparse.
    """
    assert parameter.grad is not None
    if parameter.grad.is_sparse:
        raise RuntimeError(
            "This optimizer does not support sparse gradients: build embeddings with sparse=False."
        )
    if not holds_whole_rows(parameter):
        raise ValueError(
            "This optimizer needs whole rows, and ranks share a parameter by columns: shard it by "
            "rows."
        )
    return local(parameter.grad)


def move(parameter: Tensor, update: Tensor, group: dict[str, Any]) -> None:
    """Shrink a parameter by its group's weight decay, and subtract `update` from it.

    Args:
        parameter: The parameter to move; this rank may hold only a part of it.
        update: The update of this part, with the learning rate included.
        group: The group of the parameter.
    """
    weight = local(parameter)
    wide = weight.to(update.dtype)  # the weight itself, unless it has 16 bits
    if group["weight_decay"]:
        wide.mul_(1 - group["lr"] * group["weight_decay"])
    wide.sub_(update)
    if wide is not weight:
        weight.copy_(wide)


def added_over_rows(sums: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """Add up sums over the rows of matrices [m, n] that ranks share by rows.

    The matrices of a stack [..., m, n] are whole on a rank, so that their sums are complete.

    Args:
        sums: A sum over the rows that this rank holds, of any shape, for each parameter.
        parameters: The parameter that each sum belongs to.
    """
    totals = list(sums)
    matrices = [index for index, parameter in enumerate(parameters) if parameter.ndim == 2]
    added = added_over_ranks(
        [sums[index].flatten() for index in matrices], [parameters[index] for index in matrices]
    )
    for index, total in zip(matrices, added, strict=True):
        totals[index] = total.view_as(sums[index])
    return totals


def _by_size(matrices: Matrices) -> Iterator[Matrices]:
    """Yield the matrices in parts of at most `_TOGETHER` elements, or of one matrix."""
    part: Matrices = []
    elements = 0
    for parameter, group in matrices:
        elements += parameter.numel()  # of all ranks, which must form the same parts
        if part and elements > _TOGETHER:
            yield part
            part, elements = [], parameter.numel()
        part.append((parameter, group))
    if part:
        yield part
