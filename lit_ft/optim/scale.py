"""SCALE: gradient descent on normalised gradients, with momentum in the output head alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lit_ft.compat.ranges import Decay, NonNegative
from lit_ft.optim.matrix_optimizer import (
    SMALLEST,
    Matrices,
    MatrixOptimizer,
    added_over_rows,
    gradient_of,
    held_gradient_of,
    move,
)
from lit_ft.tensors.row_blocks import row_blocks
from lit_ft.tensors.sharding import local


class Scale(MatrixOptimizer):
    """SCALE (Glentis et al., arXiv:2506.16659): almost no state for matrices.

    The gradient of a matrix is divided by the root mean square of each of its rows or columns, so
    an update has the size of AdamW's first one. In a linear layer [out, in], these are the rows
    (`dim: -1`), which are the columns of the paper's transposed notation. In an embedding
    [tokens, features], they are the columns (`dim: -2`). In the output head, a running mean of
    gradients (`momentum: 0.9`) is normalised in place of the gradient, because that layer's
    gradients vary most. AdamW steps vectors.

    If ranks share a matrix by rows, its rows need no message. For its columns, the sums of squares
    of several matrices travel in one message.

    Args:
        params: The parameters to step, as tensors, named tensors or groups. Give the embeddings and
            the output head groups of their own, with `dim` and `momentum`.
        lr: The learning rate.
        weight_decay: The decoupled weight decay, which is multiplied by the learning rate.
        momentum: The decay rate of the running mean of gradients; 0 keeps no mean.
        dim: The dimension over which a mean of squares is taken: -1 for linear layers and output
            heads, -2 for embeddings.
        betas: The decay rates of AdamW's first and second moments.
        eps: The number that AdamW adds to the square root of the second moment.
        fused: Whether to use torch's fused AdamW; None lets torch decide.

    Raises:
        ValueError: If `lr` or `weight_decay` is negative, or, while stepping, if a matrix is
            sharded by its columns.
        RuntimeError: While stepping, if a gradient is sparse.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: NonNegative = 1e-3,
        *,
        weight_decay: NonNegative = 0.0,
        momentum: Decay = 0.0,
        dim: Literal[-1, -2] = -1,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            weight_decay=weight_decay,
            betas=betas,
            eps=eps,
            fused=fused,
            momentum=momentum,
            dim=dim,
        )
        self._mean_of_all_rows: Tensor | None = None  # of squares, while some rows are stepped

    @contextmanager
    def rows_apart(self, parameter: Tensor, group: dict[str, Any]) -> Iterator[bool]:
        """Add up the squares of the columns first, if it is they that are normalised."""
        gradient = held_gradient_of(parameter)
        if parameter.ndim != 2 or group["use_adamw"] or group["dim"] == -1:
            yield True
            return
        if group["momentum"]:  # all rows of the mean must have moved before
            yield False
            return
        squares = torch.zeros(parameter.shape[-1], device=parameter.device)
        for rows in row_blocks(parameter):
            norms = torch.linalg.vector_norm(gradient[rows], dim=-2, dtype=squares.dtype)
            squares += norms.square()
        self._mean_of_all_rows = squares / len(parameter)
        try:
            yield True
        finally:
            self._mean_of_all_rows = None

    def _step_matrices(self, matrices: Matrices) -> None:
        known = self._mean_of_all_rows
        means = self._means(matrices) if known is None else [known] * len(matrices)
        for (parameter, group), mean in zip(matrices, means, strict=True):
            size = mean.sqrt().clamp_(min=SMALLEST)
            direction = self._direction(parameter, group)
            move(parameter, direction * (group["lr"] / size).unsqueeze(group["dim"]), group)

    def _means(self, matrices: Matrices) -> list[Tensor]:
        """Return the means of squares over each matrix's rows or columns, of all ranks' rows."""
        squares = []
        for parameter, group in matrices:
            if group["momentum"]:
                self._add_to_mean(parameter, group)
            direction = self._direction(parameter, group)
            squares.append(torch.linalg.vector_norm(direction, dim=group["dim"]).square())
        over_rows = [i for i, (_, group) in enumerate(matrices) if group["dim"] == -2]
        totals = added_over_rows(
            [squares[i] for i in over_rows], [matrices[i][0] for i in over_rows]
        )
        for i, total in zip(over_rows, totals, strict=True):
            squares[i] = total
        return [
            sums / parameter.shape[group["dim"]]
            for (parameter, group), sums in zip(matrices, squares, strict=True)
        ]

    def _add_to_mean(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], gradient_of(parameter)
        mean = state.get("momentum_buffer")
        if mean is None:
            mean = torch.zeros_like(parameter, dtype=gradient.dtype)
        # Optimizer.load_state_dict has cast it to the dtype of the parameter.
        state["momentum_buffer"] = mean.to(gradient.dtype)
        local(state["momentum_buffer"]).lerp_(gradient, 1 - group["momentum"])

    def _direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """Return this rank's part of what is normalised: the running mean or the gradient."""
        if group["momentum"]:
            return local(self.state[parameter]["momentum_buffer"])
        return gradient_of(parameter)
