"""APOLLO: AdamW's sizes of steps, seen in random subspaces, on the gradient itself."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
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
from lit_ft.tensors.sharding import added_over_ranks, first_row, local
from lit_ft.tensors.stochastic_rounding import keyed_generator


class Apollo(MatrixOptimizer):
    """APOLLO (Zhu et al., arXiv:2412.05270): moments of `rank` rows or columns for a matrix.

    AdamW's moments are kept for R, the gradient G [..., m, n] times a random matrix P [rank, k] of
    variance 1 / rank, where k is the shorter side: R = G Pᵀ if m ≥ n, and R = P G otherwise. The
    step that AdamW would take on R, R̃, says how far to go along G. With `per="channel"`, each row
    (or column, if they are longer) of G is scaled by |R̃ᵢ| / |Rᵢ|. With `per="tensor"`, the matrix
    is scaled by |R̃| / |R|; this is APOLLO-Mini, with a rank of 1 and a scale of √128.

    The norm of a scaled gradient grows by at most the factor `growth` per step. A norm that follows
    a zero gradient is not limited.

    P depends on the seed, its shape and the number of its renewals alone. It is not part of the
    state, and matrices of one shape share it. If ranks share matrices by rows, R = P G is a sum
    over the ranks, and so are the norms: two or three messages for several matrices.

    AdamW steps vectors, and groups with `use_adamw: True`, which embeddings and the output head
    belong into.

    Args:
        params: The parameters to step, as tensors, named tensors or groups.
        lr: The learning rate of both rules.
        rank: The rows of P; at most the shorter side of the matrix is used.
        scale: The factor α of the scaled gradient.
        per: The part of a matrix that has a scale of its own: a row or column ("channel"), or the
            whole matrix ("tensor").
        refresh_every: The number of optimizer steps after which P is drawn again.
        growth: The largest factor by which the norm of a scaled gradient may grow in a step.
        seed: The seed of P, the same on every rank.
        weight_decay: The decoupled weight decay, which is multiplied by the learning rate.
        betas: The decay rates of the first and second moments.
        eps: The number added to the square root of the second moment.
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
        rank: Count = 128,
        scale: Positive = 1.0,
        per: Literal["channel", "tensor"] = "channel",
        refresh_every: Count = 200,
        growth: Annotated[float, Ge(1)] = 1.01,
        seed: int = 0,
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
            rank=rank,
            scale=scale,
            per=per,
            refresh_every=refresh_every,
            growth=growth,
        )
        self._seed = seed
        # The newest P of each shape, with the number of its renewals.
        self._projections: dict[tuple[Any, ...], tuple[int, Tensor]] = {}

    def _step_matrices(self, matrices: Matrices) -> None:
        parameters = [parameter for parameter, _ in matrices]
        seen = [self._project(parameter, group) for parameter, group in matrices]
        wide = [i for i, parameter in enumerate(parameters) if _is_wide(parameter)]
        totals = added_over_rows([seen[i] for i in wide], [parameters[i] for i in wide])
        for i, total in zip(wide, totals, strict=True):
            seen[i] = total
        factors = self._factors(matrices, seen)
        for (parameter, group), factor, limit in zip(
            matrices, factors, self._limits(matrices, factors), strict=True
        ):
            beta1, beta2 = group["betas"]
            step = self.state[parameter]["step"]
            correction = (1 - beta2**step) ** 0.5 / (1 - beta1**step)
            size = group["lr"] * group["scale"] * correction
            move(parameter, gradient_of(parameter) * (factor * limit * size), group)

    def _project(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """Return R of the rows that this rank holds, and count the step."""
        state, gradient = self.state[parameter], gradient_of(parameter)
        state["step"] = state.get("step", 0) + 1
        short = min(parameter.shape[-2:])
        renewals = (state["step"] - 1) // group["refresh_every"]
        projection = self._projection(min(group["rank"], short), short, renewals, gradient)
        if not _is_wide(parameter):
            return gradient @ projection.T
        if parameter.ndim == 2:
            first, rows = first_row(parameter), gradient.shape[0]
            projection = projection[:, first : first + rows]
        return projection @ gradient

    def _projection(self, rank: int, length: int, renewals: int, like: Tensor) -> Tensor:
        key = (rank, length, like.dtype, like.device)
        held = self._projections.get(key)
        if held is None or held[0] != renewals:
            # Drawn on the CPU, whose bits are the same for every device.
            generator = keyed_generator(torch.device("cpu"), self._seed, rank, length, renewals)
            drawn = torch.randn(rank, length, generator=generator, device="cpu") / rank**0.5
            held = renewals, drawn.to(like)
            self._projections[key] = held
        return held[1]

    def _factors(self, matrices: Matrices, seen: list[Tensor]) -> list[Tensor]:
        """Update the moments with R, and return |R̃| / |R| in a shape that multiplies G."""
        norms = []
        for (parameter, group), coordinates in zip(matrices, seen, strict=True):
            adapted = self._adapted(parameter, group, coordinates)
            dim: Any = -2 if _is_wide(parameter) else -1
            norms.append(
                torch.stack(
                    [
                        torch.linalg.vector_norm(x, dim=dim, keepdim=True).square()
                        for x in (adapted, coordinates)
                    ]
                )
            )
        whole = [i for i, (_, group) in enumerate(matrices) if group["per"] == "tensor"]
        for i in whole:
            norms[i] = norms[i].sum(dim=(-2, -1), keepdim=True)
        tall = [i for i in whole if not _is_wide(matrices[i][0])]
        totals = added_over_rows([norms[i] for i in tall], [matrices[i][0] for i in tall])
        for i, total in zip(tall, totals, strict=True):
            norms[i] = total
        return [adapted.sqrt() / (own.sqrt() + SMALLEST) for adapted, own in norms]

    def _adapted(self, parameter: Tensor, group: dict[str, Any], coordinates: Tensor) -> Tensor:
        """Update the moments of R, and return R̃ without its bias correction."""
        state = self.state[parameter]
        for name in ("exp_avg", "exp_avg_sq"):
            moment = state.get(name)
            if moment is None:
                moment = _zeros(parameter, coordinates)
            # Optimizer.load_state_dict has cast it to the dtype of the parameter.
            state[name] = moment.to(coordinates.dtype)
        mean, square = local(state["exp_avg"]), local(state["exp_avg_sq"])
        beta1, beta2 = group["betas"]
        mean.mul_(beta1).add_(coordinates, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(coordinates, coordinates, value=1 - beta2)
        return mean / (square.sqrt().add_(group["eps"]))

    def _limits(self, matrices: Matrices, factors: list[Tensor]) -> list[Tensor]:
        """Return the factors, at most 1, that limit the growth of the scaled gradients' norms."""
        sums = [
            torch.linalg.vector_norm(gradient_of(parameter) * factor).square().view(1)
            for (parameter, _), factor in zip(matrices, factors, strict=True)
        ]
        limits = []
        totals = added_over_ranks(sums, [parameter for parameter, _ in matrices])
        for (parameter, group), total in zip(matrices, totals, strict=True):
            state, norm = self.state[parameter], total.sqrt().squeeze()
            last = state.get("norm", torch.zeros_like(norm)).to(norm.dtype)
            growth = (norm / (last + SMALLEST) / group["growth"]).clamp_(min=1)
            limit = torch.where(last > 0, 1 / growth, torch.ones_like(norm))
            state["norm"] = norm * limit
            limits.append(limit)
        return limits


def _is_wide(parameter: Tensor) -> bool:
    return parameter.shape[-2] < parameter.shape[-1]


def _zeros(parameter: Tensor, coordinates: Tensor) -> Tensor:
    """Return a moment of R that is zero, sharded as the parameter if R is."""
    if _is_wide(parameter) and parameter.ndim == 2:
        return torch.zeros_like(coordinates)
    dim = -2 if _is_wide(parameter) else -1
    like = parameter.detach().narrow(dim, 0, coordinates.shape[dim])
    return torch.zeros_like(like, dtype=coordinates.dtype, memory_format=torch.contiguous_format)
