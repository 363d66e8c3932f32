"""SinkGD: gradient descent whose updates have rows and columns of one size, without any state."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lit_ft.compat.ranges import Count, NonNegative, Positive
from lit_ft.optim.matrix_optimizer import (
    SMALLEST,
    Matrices,
    MatrixOptimizer,
    added_over_rows,
    gradient_of,
    move,
)


class SinkGD(MatrixOptimizer):
    """SinkGD (Scetbon et al., arXiv:2502.06742): matrices have no state at all.

    The update of a matrix is its gradient with rows and columns scaled in turn, `iterations` times,
    to a root mean square of 1 (SR-Sinkhorn, algorithm 3). An element of it is rᵢ gᵢⱼ cⱼ, so two
    vectors are computed from the squares of the gradient, and no other matrix:
    rᵢ = √(n / Σⱼ gᵢⱼ² cⱼ²), and then cⱼ = √(m / Σᵢ gᵢⱼ² rᵢ²).

    Embeddings and the output head belong into a group with `use_adamw: True`, as in the paper.
    AdamW also steps vectors. The gradients of a stack of matrices [..., m, n] are scaled matrix by
    matrix.

    If ranks share matrices by rows, each iteration sends the sums over the columns of several
    matrices in one message.

    Args:
        params: The parameters to step, as tensors, named tensors or groups.
        lr: The learning rate of both rules.
        scale: The factor of the learning rate for matrices. The paper uses 0.05 with a learning
            rate of 0.02.
        iterations: How often rows and columns are scaled.
        weight_decay: The decoupled weight decay, which is multiplied by the learning rate.
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
        scale: Positive = 1.0,
        iterations: Count = 5,
        weight_decay: NonNegative = 0.0,
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
            scale=scale,
        )
        self._iterations = iterations

    def _step_matrices(self, matrices: Matrices) -> None:
        scales = self._scales([parameter for parameter, _ in matrices])
        for (parameter, group), (rows, columns) in zip(matrices, scales, strict=True):
            update = gradient_of(parameter) * rows.unsqueeze(-1)
            update.mul_((group["lr"] * group["scale"] * columns).unsqueeze(-2))
            move(parameter, update, group)

    def _scales(self, parameters: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return the scales of the rows [..., m] and columns [..., n] of each gradient."""
        squares = [gradient_of(parameter).square() for parameter in parameters]
        rows: list[Tensor] = []
        columns = [s.new_ones((*s.shape[:-2], s.shape[-1])) for s in squares]  # s may have no row
        for _ in range(self._iterations):
            sums = [s @ c.square().unsqueeze(-1) for s, c in zip(squares, columns, strict=True)]
            rows = [
                _scale(of_rows.squeeze(-1), parameter.shape[-1])
                for of_rows, parameter in zip(sums, parameters, strict=True)
            ]
            sums = [r.square().unsqueeze(-2) @ s for s, r in zip(squares, rows, strict=True)]
            columns = [
                _scale(of_columns.squeeze(-2), parameter.shape[-2])
                for of_columns, parameter in zip(
                    added_over_rows(sums, parameters), parameters, strict=True
                )
            ]
        return list(zip(rows, columns, strict=True))


def _scale(sums: Tensor, length: int) -> Tensor:
    """Return √length / √sums, which gives rows or columns of `length` a mean square of 1."""
    norms = sums.sqrt().clamp_(min=SMALLEST)
    return norms.reciprocal_().mul_(length**0.5)
