"""What happens around an optimizer step: the fold behind it, and now and then a new basis."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lit_ft.subspace.basis_tracker import BasisTracker
from lit_ft.subspace.checks import (
    MATCH_ADAMW,
    check_finite,
    check_layer,
    check_settings,
    check_steps_from_zero,
)
from lit_ft.subspace.layers.base import SubspaceLayer
from lit_ft.subspace.projectors import BasisInput, Projector
from lit_ft.subspace.scale import matching_scale
from lit_ft.subspace.schedule import Refresh
from lit_ft.subspace.stats import SubspaceStats

log = logging.getLogger(__name__)


def _without_autocast(method: Callable[..., None]) -> Callable[..., None]:
    """Of a step that is taken under autocast, as Lightning's manual optimization takes it."""

    @wraps(method)
    def exact(self: SubspaceUpdater, *args: Any, **kwargs: Any) -> None:
        device = next(iter(self.layers.values())).basis.device
        with torch.autocast(device.type, enabled=False):
            method(self, *args, **kwargs)

    return exact


class SubspaceUpdater:
    """Trains layers in subspaces with an ordinary optimizer.

    After the optimizer has stepped S, the step is folded into W and S is zero again; then the
    bases whose turn it is move, and the optimizer's moments with them. A layer that is frozen after
    `inject` (`layer.requires_grad_(False)`) stays as it is, basis included.

    Args:
        layers: As from `inject`, by name.
        projector: Moves the bases.
        scale: α, a positive number, or "match_adamw" for `matching_scale`: the learning rate then
            means what it means to the optimizer on whole weights.
        refresh: When the bases move; None for every `projector.every` steps, staggered.
        compiled: torch.compile runs the model, with one graph for each set of layers whose bases
            move at the same step: they are not staggered, which leaves two, and as many again
            for the steps that are logged.
        seed: Of random bases and of stochastic rounding.
        all_reduce: Averages tensors over the data-parallel ranks, in place; None for one process.
    """

    def __init__(
        self,
        layers: Mapping[str, SubspaceLayer],
        projector: Projector,
        *,
        scale: float | str = MATCH_ADAMW,
        refresh: Refresh | None = None,
        compiled: bool = False,
        seed: int = 0,
        all_reduce: Callable[[Sequence[Tensor]], None] | None = None,
    ) -> None:
        check_settings(scale=scale)
        self.layers = dict(layers)
        self.scale = scale
        self.seed = seed
        self.all_reduce = all_reduce
        self.step = 0
        self.stats = SubspaceStats(self.layers)
        self.tracker = BasisTracker(
            self.layers,
            projector,
            refresh=refresh or Refresh(),
            compiled=compiled,
            seed=seed,
            all_reduce=all_reduce,
            stats=self.stats,
        )
        self._by_delta: dict[Tensor, str] = {}
        self._indices = {name: index for index, name in enumerate(self.layers)}
        self._attached = False

    def reschedule(self, refresh: Refresh) -> None:
        """Let the bases move when `refresh` says; call it while nothing trains."""
        self.tracker.reschedule(refresh, step=self.step)

    def attach(self, optimizer: Optimizer) -> RemovableHandle:
        """Follow `optimizer`'s steps, until the handle that is returned is removed.

        Raises:
            ValueError: The optimizer does not hold the layers' deltas (it was built before
                `inject`), or cannot train what is zero before each step; or the projector needs
                whole gradients of a sharded weight, or a weight has become float16 or has got
                another number of rows.
        """
        if self._attached:
            raise ValueError("The steps follow an optimizer already: call stop() before another.")
        check_steps_from_zero(optimizer)
        self.freeze_weights()
        for name, layer in self.layers.items():
            check_layer(name, layer, forms_gradients=self.tracker.projector.forms_gradients)
        held = {p for group in optimizer.param_groups for p in group["params"]}
        for name, layer in self.layers.items():
            if layer.delta.requires_grad and layer.delta not in held:
                raise ValueError(
                    f"The optimizer does not hold {name}.delta: build it after inject(), on the "
                    "parameters that require a gradient."
                )
        # Not before: sharding a model puts other parameters in place of those of `inject`.
        self._by_delta = {layer.delta: name for name, layer in self.layers.items()}
        self._attached = True
        self.tracker.prepare(self.step)
        return optimizer.register_step_post_hook(self._after_step)

    def begin_accumulation(self) -> None:
        """Forget the basis_input of a step that was skipped; call it where gradients are zeroed."""
        for layer in self.layers.values():
            layer.clear_basis_input()

    @_without_autocast
    @torch.no_grad()
    def before_step(self, optimizer: Optimizer, *, skips_overflow: bool = False) -> None:
        """Check the gradients and take the bases that come from G itself.

        Call it when the gradients are complete, and unscaled if a grad scaler scales them.

        Args:
            optimizer: Whose step comes next.
            skips_overflow: A grad scaler skips the step if a gradient is not finite.

        Raises:
            FloatingPointError: A gradient is not finite; names the layers, none of which has moved.
        """
        if not skips_overflow:
            check_finite(
                {name: layer.delta.grad for _, name, layer in self._stepped(optimizer)}, self.step
            )
        for group, name, layer in self._stepped(optimizer):
            gradient, layer.weight.grad = layer.weight.grad, None
            if self.tracker.basis_input(name, self.step) is not BasisInput.GRADIENT:
                continue  # a callback that unfreezes the model has asked for it
            if gradient is None and self.all_reduce is not None:
                gradient = torch.zeros_like(layer.weight)
            if gradient is None:
                continue
            if self.all_reduce is not None:
                self.all_reduce([gradient])
            gradient = gradient.mT if layer.views_transposed else gradient
            self.tracker.move_to_gradient(optimizer, group, name, gradient, step=self.step)
            assert layer.delta.grad is not None
            layer.delta.grad.copy_(gradient.to(layer.basis.dtype) @ layer.basis.T)

    @_without_autocast
    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        # A grad scaler leaves it to a fused optimizer to take no step after an overflow.
        overflow = getattr(optimizer, "found_inf", None)
        if overflow is not None and overflow.item():
            self.begin_accumulation()
            return
        stepped = self._stepped(optimizer)
        if not stepped:  # a training step without a loss
            return
        if self.step == 0:
            self._warn_of_idle_layers()
        self.tracker.reduce_basis_inputs(layer for _, _, layer in stepped)
        for group, name, layer in stepped:
            scale = self.scale
            if isinstance(scale, str):
                scale = matching_scale(layer, optimizer, group)
            self.stats.record_step(name, scale=scale, lr=group["lr"])
            layer.fold(
                scale=scale,
                decay=group["lr"] * group.get("weight_decay", 0.0),
                rounding_key=(self.seed, self.step, self._indices[name]),
            )
            self.tracker.move_if_due(optimizer, group, name, step=self.step)
        self.tracker.advance(self.step)
        self.stats.end_step()
        self.step += 1
        self.tracker.prepare(self.step)

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs beside the layers' own tensors."""
        return {"step": self.step, **self.tracker.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.step = state["step"]
        self.tracker.load_state_dict(state, step=self.step)
        if self._attached:  # an optimizer that is built later would take what asks for a gradient
            self.tracker.prepare(self.step)

    def stop(self) -> None:
        """Ask for no more sketches, and leave layers whose weights whoever comes next can train."""
        self._attached = False
        self.stats.await_snapshot(None)
        for layer in self.layers.values():
            layer.basis.requires_grad_(False)
            if layer.delta.requires_grad:  # else frozen, or stopped before
                layer.weight.requires_grad_(True)
                layer.delta.requires_grad_(False)
            layer.clear_basis_input()

    def freeze_weights(self) -> None:
        """Let the layers move through their deltas again, after `stop`; but not the frozen ones."""
        for layer in self.layers.values():
            if layer.weight.requires_grad:
                layer.weight.requires_grad_(False)
                layer.delta.requires_grad_(True)

    def _stepped(self, optimizer: Optimizer) -> list[tuple[dict[str, Any], str, SubspaceLayer]]:
        return [
            (group, self._by_delta[p], self.layers[self._by_delta[p]])
            for group in optimizer.param_groups
            for p in group["params"]
            if p in self._by_delta and p.grad is not None
        ]

    def _warn_of_idle_layers(self) -> None:
        idle = [
            name
            for name, layer in self.layers.items()
            if layer.delta.requires_grad and layer.delta.grad is None
        ]
        if idle:
            log.warning(
                "The first step's loss did not come through %d of the layers that move in "
                "subspaces: %s. Where a model takes a layer's weight and does not call the layer, "
                "the weight stands still: leave it out of the targets.",
                len(idle),
                ", ".join(idle[:4]) + ", ..." * (len(idle) > 4),
            )
