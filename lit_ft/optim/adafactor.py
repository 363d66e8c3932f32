"""Adafactor for sharded parameters, and a variant that reports the learning rate it chooses."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import transformers.optimization
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from lit_ft.compat.ranges import Positive
from lit_ft.tensors.row_blocks import row_blocks
from lit_ft.tensors.sharding import added_over_ranks, full_tensor, holds_whole_rows, local


class Adafactor(transformers.optimization.Adafactor):
    """transformers' Adafactor (Shazeer and Stern, arXiv:1804.04235), on sharded parameters too.

    Each rank computes the row means of the rows that it holds. Three quantities depend on all rows:
    the column means, the size of the update (which decides how it is clipped) and the size of the
    parameter. They come from sums over the ranks: 2 · columns + 2 numbers for each matrix, sent for
    all parameters in one message per step.

    The update is gᵢⱼ / √(rᵢ cⱼ / r̄), with row means r, their mean r̄ and column means c. Its
    squares sum to r̄ Σⱼ (Σᵢ gᵢⱼ² / rᵢ) / cⱼ, so its size is known before the update is formed.

    Args:
        params: The parameters to step, as tensors, named tensors or groups.
        **options: The options of transformers' Adafactor.

    Raises:
        ValueError: While stepping, if a parameter is sharded by its columns.
        RuntimeError: While stepping, if a gradient is sparse.
    """

    _of_all_rows: tuple[Any, Tensor, Tensor] | None = None  # while some rows are stepped

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stepped = [
            (parameter, group)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        if self._of_all_rows is not None:
            for parameter, group in stepped:
                self._move(parameter, group, *self._of_all_rows)
            return loss
        sums = [self._sums(parameter, group) for parameter, group in stepped]
        totals = added_over_ranks(sums, [parameter for parameter, _ in stepped])
        for (parameter, group), total in zip(stepped, totals, strict=True):
            self._move(parameter, group, *self._sizes(parameter, group, total))
        return loss

    @contextmanager
    def rows_apart(self, parameter: Tensor, group: dict[str, Any]) -> Iterator[bool]:
        """Compute what depends on all rows of a matrix, for steps of some rows in the block.

        See `lit_ft.optim.row_chunked`.

        Yields:
            Whether some rows can be stepped without the others.
        """
        if parameter.ndim != 2:
            yield False
            return
        sums = self._sums(parameter, group, row_blocks(parameter))
        self._of_all_rows = self._sizes(parameter, group, sums)
        try:
            yield True
        finally:
            self._of_all_rows = None

    @staticmethod
    def _get_lr(param_group: dict[str, Any], param_state: dict[str, Any]) -> Any:
        # torch.distributed.checkpoint sets 0, and steps only to create the state.
        if param_group["lr"] == 0:
            return 0.0
        rate = cast("Callable[..., Any]", transformers.optimization.Adafactor._get_lr)
        return rate(param_group, param_state)

    def _sums(
        self, parameter: Tensor, group: dict[str, Any], blocks: Sequence[slice] = (slice(None),)
    ) -> Tensor:
        """Update the state with the gradient, and return the sums to add over the ranks, 1-D.

        The first sum is Σ parameter² (0 without `scale_parameter`). For a matrix, Σ rᵢ,
        Σᵢ gᵢⱼ² [columns] and Σᵢ gᵢⱼ² / rᵢ [columns] follow. For any other parameter, Σ update²
        follows, because its update depends only on the rank's own part.

        Args:
            parameter: The parameter.
            group: The group of the parameter.
            blocks: The rows of a matrix that are looked at together.
        """
        state, held = self.state[parameter], _held_gradient(parameter)
        dtype = _wide(held.dtype)
        if "step" not in state:
            state.update(self._new_state(parameter, dtype, group))
        for name, value in state.items():
            if isinstance(value, Tensor):  # Optimizer.load_state_dict has cast it
                state[name] = value.to(dtype)
        state["step"] += 1
        new, eps = state["step"] ** group["decay_rate"], group["eps"][0]
        size = held.new_zeros(1, dtype=dtype)
        if group["scale_parameter"]:
            weight = local(parameter)
            for rows in blocks if weight.ndim else [...]:
                size += torch.linalg.vector_norm(weight[rows], dtype=dtype).square()
        if held.ndim < 2:
            squares = held.to(dtype).square()
            mean = local(state["exp_avg_sq"])
            mean.mul_(1 - new).add_(squares + eps, alpha=new)
            return torch.cat([size, squares.div_(mean).sum().view(1)])
        row, col = local(state["exp_avg_sq_row"]), local(state["exp_avg_sq_col"])
        of_columns, weighted = torch.zeros_like(col), torch.zeros_like(col)
        for rows in blocks:
            squares = held[rows].to(dtype).square()
            row[rows].mul_(1 - new).add_(squares.mean(dim=-1) + eps, alpha=new)
            of_columns += squares.sum(dim=-2)
            weighted += squares.div_(row[rows].unsqueeze(-1)).sum(dim=-2)
        if held.ndim == 2:
            return torch.cat([size, row.sum().view(1), of_columns, weighted])
        col.mul_(1 - new).add_(of_columns / held.shape[-2] + eps, alpha=new)
        update = row.mean(dim=-1, keepdim=True) / col * weighted
        return torch.cat([size, update.sum().view(1)])

    def _sizes(
        self, parameter: Tensor, group: dict[str, Any], total: Tensor
    ) -> tuple[Any, Tensor, Tensor]:
        """Return the rate, the factor of the clipped update, and the mean of the rows' means.

        Args:
            parameter: The parameter, whose column means are updated.
            group: The group of the parameter.
            total: The result of `_sums`, added over all ranks.
        """
        state, update_size, row_mean = self.state[parameter], total[1], total
        if parameter.ndim == 2:
            rows, columns = parameter.shape
            row_sum, of_columns, weighted = torch.split(total[1:], [1, columns, columns])
            row_mean, col = row_sum / rows, local(state["exp_avg_sq_col"])
            new = state["step"] ** group["decay_rate"]
            col.mul_(1 - new).add_(of_columns / rows + group["eps"][0], alpha=new)
            update_size = (row_mean / col * weighted).sum()
        elif parameter.ndim > 2:
            row_mean = local(state["exp_avg_sq_row"]).mean(dim=-1, keepdim=True)
        state["RMS"] = (total[0] / parameter.numel()).sqrt()
        rate = self._get_lr(group, state)
        rms = (update_size / parameter.numel()).sqrt()
        return rate, rate / (rms / group["clip_threshold"]).clamp_(min=1.0), row_mean

    def _move(
        self,
        parameter: Tensor,
        group: dict[str, Any],
        rate: Any,
        factor: Tensor,
        row_mean: Tensor,
    ) -> None:
        """Step a parameter, or some rows of a matrix; see `_sizes`."""
        state, gradient = self.state[parameter], _held_gradient(parameter)
        gradient = gradient.to(_wide(gradient.dtype))
        if gradient.ndim < 2:
            update = local(state["exp_avg_sq"]).rsqrt()
        else:
            row, col = local(state["exp_avg_sq_row"]), local(state["exp_avg_sq_col"])
            update = (row / row_mean).rsqrt_().unsqueeze(-1) * col.rsqrt().unsqueeze(-2)
        update.mul_(gradient).mul_(factor)
        if group["beta1"] is not None:
            mean = local(state["exp_avg"])
            update = mean.mul_(group["beta1"]).add_(update, alpha=1 - group["beta1"])
        weight = local(parameter)
        wide = weight.to(gradient.dtype)  # the weight itself, unless it has 16 bits
        if group["weight_decay"]:
            wide.mul_(1 - group["weight_decay"] * rate)
        wide.sub_(update)
        if wide is not weight:
            weight.copy_(wide)

    def _new_state(
        self, parameter: Tensor, dtype: torch.dtype, group: dict[str, Any]
    ) -> dict[str, Any]:
        if not holds_whole_rows(parameter):
            raise ValueError(
                "Adafactor needs whole rows, and ranks share a parameter by columns: shard it by "
                "rows."
            )
        weight, zeros = parameter.detach(), partial(torch.zeros_like, dtype=dtype)
        state: dict[str, Any] = {"step": 0, "RMS": 0}
        if group["beta1"] is not None:
            state["exp_avg"] = zeros(weight)
        if weight.ndim < 2:
            state["exp_avg_sq"] = zeros(weight)
            return state
        state["exp_avg_sq_row"] = zeros(weight.select(-1, 0))
        # The column means of a matrix are the same on every rank.
        matrix = weight.ndim == 2
        state["exp_avg_sq_col"] = (
            local(weight).new_zeros(weight.shape[-1], dtype=dtype)
            if matrix
            else zeros(weight.select(-2, 0))
        )
        return state


class RelativeStepAdafactor(Adafactor):
    """Adafactor with relative steps: no learning rate to choose.

    Step t changes a parameter by ρ · RMS(parameter) · min(limit, 1/√t). The limit is 1e-2, or
    1e-6 · t with `warmup_init` (Shazeer and Stern, arXiv:1804.04235, section 8). The paper's ρ = 1
    is meant for training from scratch.

    In transformers, `group["lr"]` is None, which breaks learning-rate monitors. Here it holds the
    rate of the last step, averaged over the group's parameters and with RMS(parameter) included.
    Before training, it holds the rate of the first step. It is only a report: setting it changes
    nothing, except that 0 prevents the step. `sets_own_learning_rate` tells code that builds
    schedulers to leave this optimizer alone.

    Args:
        params: The parameters to step, as tensors, named tensors or groups.
        relative_size: The positive factor ρ of all steps; 0.1 suits fine-tuning.
        **options: The options of transformers' Adafactor, except `lr`, `relative_step` and
            `scale_parameter`.

    Raises:
        ValueError: If `relative_size` is not positive.
    """

    sets_own_learning_rate = True

    def __init__(self, params: ParamsT, *, relative_size: Positive = 1.0, **options: Any) -> None:
        if relative_size <= 0:
            raise ValueError(
                f"relative_size={relative_size}: give a positive number, such as 0.1 to fine-tune."
            )
        # transformers' class is not annotated.
        super().__init__(params, scale_parameter=True, relative_step=True, **options)  # type: ignore[no-untyped-call]
        self.defaults["relative_size"] = relative_size
        for group in self.param_groups:
            group.setdefault("relative_size", relative_size)
            first = [
                {"step": 1, "RMS": full_tensor(p.detach().norm()) / p.numel() ** 0.5}
                for p in group["params"]
            ]
            group["lr"] = self._mean_rate(group, first)
        self.register_step_post_hook(_report_rate)

    @staticmethod
    def _get_lr(param_group: dict[str, Any], param_state: dict[str, Any]) -> float:
        rate: float = Adafactor._get_lr(param_group, param_state)
        return float(param_group["relative_size"]) * rate

    def _mean_rate(self, group: dict[str, Any], states: list[dict[str, Any]]) -> float:
        return statistics.fmean(float(self._get_lr(group, state)) for state in states)


def _report_rate(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    assert isinstance(optimizer, RelativeStepAdafactor)
    for group in optimizer.param_groups:
        states = [optimizer.state[p] for p in group["params"] if p in optimizer.state]
        if states:
            group["lr"] = optimizer._mean_rate(group, states)


def _held_gradient(parameter: Tensor) -> Tensor:
    """Return this rank's part of the gradient."""
    assert parameter.grad is not None
    if parameter.grad.is_sparse:
        raise RuntimeError(
            "Adafactor does not support sparse gradients: build embeddings with sparse=False."
        )
    return local(parameter.grad)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
