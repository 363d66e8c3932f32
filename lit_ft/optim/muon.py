"""Muon for the hidden matrices and AdamW for the rest, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.optimizer import ParamsT

from lit_ft.compat.ranges import Count


class MuonAdamW(Optimizer):
    """torch's Muon for the groups with `use_muon: True`, and torch's AdamW for the others.

    Both work on this optimizer's own group dicts and state, so schedulers, checkpoints and narrowed
    steps see one optimizer. The weights are bit for bit the same as with two separate optimizers.

    Muon orthogonalises the momentum of a matrix (https://kellerjordan.github.io/posts/muon). Its
    update is scaled to AdamW's usual root mean square, so that AdamW's learning rate and weight
    decay carry over (arXiv:2502.16982). Parameters that are not matrices must be in AdamW's groups,
    and embeddings and output heads should be.

    Args:
        params: The parameter groups, each with `use_muon` (False if absent). Any option may differ
            between groups.
        lr: The learning rate of both optimizers.
        weight_decay: The decoupled weight decay of both optimizers, which is multiplied by the
            learning rate.
        momentum: Muon's momentum.
        nesterov: Whether Muon uses Nesterov momentum.
        ns_steps: The number of Newton-Schulz iterations in a Muon step.
        betas: The decay rates of AdamW's first and second moments.
        eps: The number that AdamW adds to the square root of the second moment. Muon's own eps is
            not affected.
        fused: Whether to use torch's fused AdamW; None lets torch decide.

    Raises:
        ValueError: If no group uses Muon, or if a group that uses it holds a parameter that is not
            a matrix.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        *,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: Count = 5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        fused: bool | None = None,
    ) -> None:
        shared = {"lr": lr, "weight_decay": weight_decay}
        muon = {
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "eps": 1e-7,
            "adjust_lr_fn": "match_rms_adamw",
        }
        adamw = {"betas": tuple(betas), "eps": eps, "fused": fused}
        self._options = {True: muon, False: adamw}
        super().__init__(params, {**shared, **muon, **adamw, "use_muon": False})
        if not any(group["use_muon"] for group in self.param_groups):
            raise ValueError(
                "No group uses Muon: set `use_muon: true` in the group of the hidden matrices, "
                "or use AdamW."
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, for Muon if it has `use_muon: True` and for AdamW otherwise.

        Raises:
            ValueError: If a group for Muon holds a parameter that is not a matrix.
        """
        options = self._options[bool(param_group.get("use_muon", False))]
        super().add_param_group({**options, **param_group})
        group = self.param_groups[-1]
        names = group.get("param_names", ["a parameter"] * len(group["params"]))
        for name, parameter in zip(names, group["params"], strict=True):
            if group["use_muon"] and parameter.ndim != 2:
                self.param_groups.pop()
                raise ValueError(
                    f"Muon takes matrices, but {name} has shape {tuple(parameter.shape)}: "
                    "set min_ndim: 2 and max_ndim: 2 in the rule of its group."
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step Muon's groups, then AdamW's; return the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer_class, uses_muon in ((Muon, True), (AdamW, False)):
            groups = [group for group in self.param_groups if group["use_muon"] is uses_muon]
            if groups:
                # torch's constructors keep the dicts themselves and fill in missing options. They
                # are cheap. Rebuilt at each step, they miss no reload and no added group.
                optimizer: Optimizer = optimizer_class(groups)
                optimizer.state = self.state
                optimizer.step()
        return loss
