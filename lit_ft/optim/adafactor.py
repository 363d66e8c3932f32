"""Adafactor that sets its own learning rate, and says which."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, cast

import torch
from torch.optim.optimizer import Optimizer, ParamsT
from transformers.optimization import Adafactor


class RelativeStepAdafactor(Adafactor):
    """transformers' Adafactor with relative steps: no learning rate to choose.

    Step t changes a parameter by ρ · RMS(parameter) · min(limit, 1/√t), where the limit is 1e-2, or
    1e-6 · t with `warmup_init` (Shazeer and Stern, arXiv:1804.04235, section 8). With ρ = 1 that is
    made for training from scratch.

    `group["lr"]` is None upstream, which breaks learning-rate monitors. Here it holds the rate of
    the last step (of the first step before it): RMS(parameter) included, averaged over the group's
    parameters. It is a report; writing it changes nothing, and `sets_own_learning_rate` tells
    whoever builds schedulers to leave this optimizer alone.

    Args:
        params: Parameters, named parameters or groups.
        relative_size: ρ.
        **options: Those of transformers' Adafactor, except `lr`, `relative_step` and
            `scale_parameter`.
    """

    sets_own_learning_rate = True

    def __init__(self, params: ParamsT, *, relative_size: float = 1.0, **options: Any) -> None:
        if relative_size <= 0:
            raise ValueError(f"relative_size={relative_size} must be positive: 0.1 fine-tunes.")
        # transformers' class is not annotated.
        super().__init__(params, scale_parameter=True, relative_step=True, **options)  # type: ignore[no-untyped-call]
        self.defaults["relative_size"] = relative_size
        for group in self.param_groups:
            group.setdefault("relative_size", relative_size)
            first = [
                {"step": 1, "RMS": p.detach().norm() / p.numel() ** 0.5} for p in group["params"]
            ]
            group["lr"] = self._mean_rate(group, first)
        self.register_step_pre_hook(_enable_grad_in_closure)
        self.register_step_post_hook(_report_rate)

    @staticmethod
    def _get_lr(param_group: dict[str, Any], param_state: dict[str, Any]) -> float:
        rate = cast("Callable[..., float]", Adafactor._get_lr)(param_group, param_state)
        return float(param_group["relative_size"]) * rate

    def _mean_rate(self, group: dict[str, Any], states: list[dict[str, Any]]) -> float:
        return statistics.fmean(float(self._get_lr(group, state)) for state in states)


def _report_rate(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    assert isinstance(optimizer, RelativeStepAdafactor)
    for group in optimizer.param_groups:
        states = [optimizer.state[p] for p in group["params"] if p in optimizer.state]
        if states:
            group["lr"] = optimizer._mean_rate(group, states)


def _enable_grad_in_closure(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Let the closure back-propagate: Adafactor.step runs it under no_grad, unlike torch's."""

    def enabled(closure: Callable[[], Any] | None) -> Callable[[], Any] | None:
        return closure if closure is None else torch.enable_grad()(closure)

    optimizer_and_closure = (args[0], *map(enabled, args[1:]))
    return optimizer_and_closure, {name: enabled(value) for name, value in kwargs.items()}
