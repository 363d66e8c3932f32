"""Do the work around an optimizer step: fold the step into the weights, and move the bases."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    """Make the method run without autocast, which is on when manual optimization steps."""

    @wraps(method)
    def exact(self: SubspaceUpdater, *args: Any, **kwargs: Any) -> None:
        device = next(iter(self.layers.values())).basis.device
        with torch.autocast(device.type, enabled=False):
            method(self, *args, **kwargs)

    return exact


class SubspaceUpdater:
    """Trains layers in subspaces with an ordinary optimizer.

    The optimizer steps each layer's small parameter S. After its step, S is folded into the weight
    W and is zero again. Then the bases that are due move. The optimizer's moments follow them, if
    the projector says so. A layer that is frozen after `inject` (`layer.requires_grad_(False)`)
    does not change, and neither does its basis.

    Args:
        layers: The layers, keyed by name, as `inject` returns them.
        projector: The rule that moves the bases.
        scale: The scale α: a positive number, or "match_adamw" for `matching_scale`, with which a
            learning rate has the same effect as on whole weights.
        refresh: The settings for when bases move; None moves each basis every `projector.every`
            optimizer steps, with the layers spread over this interval.
        compiled: Whether torch.compile runs the model. If so, all bases move at the same steps,
            because each set of layers that move together needs a graph of its own. This leaves two
            graphs, and two more for the steps that are logged.
        seed: The seed of random bases and of stochastic rounding.
        all_reduce: A function that averages tensors over the data-parallel ranks, in place; None
            for one process.
        releases_deltas: Whether the deltas have memory only while they are stepped. Nothing else
            may then write to them in training.

    Raises:
        ValueError: If the scale or the interval is invalid, or if `refresh` is adaptive and the
            projector or a compiled model does not allow it.
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
        releases_deltas: bool = False,
    ) -> None:
        check_settings(scale=scale)
        self.layers = dict(layers)
        self.scale = scale
        self.seed = seed
        self.all_reduce = all_reduce
        self.releases_deltas = releases_deltas
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
        self._in_parts: set[Tensor] = set()
        self._finished: set[str] = set()  # the layers that have been folded in this step
        self._attached = False

    def reschedule(self, refresh: Refresh) -> None:
        """Move the bases from now on as `refresh` says; call this outside of training."""
        self.tracker.reschedule(refresh, step=self.step)

    def attach(self, optimizer: Optimizer) -> RemovableHandle:
        """Follow the steps of `optimizer` until the returned handle is removed.

        Raises:
            ValueError: If an optimizer is attached already; if this one does not hold the layers'
                deltas, because it was built before `inject`; if it cannot step parameters that are
                zero; if the projector needs the whole gradient of a sharded weight; or if a weight
                has become float16, changed its shape or been sharded by columns.
        """
        if self._attached:
            raise ValueError(
                "These layers follow an optimizer already: call stop() before attaching another."
            )
        check_steps_from_zero(optimizer)
        self.freeze_weights()
        for name, layer in self.layers.items():
            check_layer(name, layer, forms_gradients=self.tracker.projector.forms_gradients)
        held = {p for group in optimizer.param_groups for p in group["params"]}
        for name, layer in self.layers.items():
            if layer.delta.requires_grad and layer.delta not in held:
                raise ValueError(
                    f"The optimizer does not hold {name}.delta: build it after inject(), on the "
                    "parameters that require gradients."
                )
        # Not earlier: sharding a model replaces the parameters that `inject` has made.
        self._by_delta = {layer.delta: name for name, layer in self.layers.items()}
        self._finished.clear()
        self._attached = True
        self.tracker.prepare(self.step)
        if not self.releases_deltas:
            for layer in self.layers.values():
                layer.store_delta()
        self._release(self.layers.values())
        return optimizer.register_step_post_hook(self._after_step)

    def begin_accumulation(self) -> None:
        """Clear what backward recorded for a skipped step; call it where gradients are zeroed."""
        for layer in self.layers.values():
            layer.clear_basis_input()

    @_without_autocast
    @torch.no_grad()
    def before_step(self, optimizer: Optimizer, *, skips_overflow: bool = False) -> None:
        """Check the gradients, and move the bases that are computed from whole gradients.

        Deltas that were released get their memory. Call it when the gradients are complete. If a
        grad scaler scales them, unscale them first.

        Args:
            optimizer: The optimizer whose step comes next.
            skips_overflow: Whether a grad scaler skips the step if a gradient is not finite. The
                gradients are then not checked here.

        Raises:
            NotFinite: If a gradient is not finite. The message names the layers. No layer has
                moved.
        """
        if not skips_overflow:
            check_finite(
                {name: layer.delta.grad for _, name, layer in self._stepped(optimizer)}, self.step
            )
        for group, name, layer in self._stepped(optimizer):
            if layer.delta not in self._in_parts:
                layer.store_delta()
            gradient, layer.weight.grad = layer.weight.grad, None
            if self.tracker.basis_input(name, self.step) is not BasisInput.GRADIENT:
                continue  # any gradient is there only because a callback unfroze the model
            if gradient is None and self.all_reduce is not None:
                gradient = torch.zeros_like(layer.weight)
            if gradient is None:
                continue
            if self.all_reduce is not None:
                self.all_reduce([gradient])
            gradient = gradient.mT if layer.views_transposed else gradient
            self.tracker.move_to_gradient(optimizer, group, name, gradient, step=self.step)
            assert layer.delta.grad is not None
            basis = layer.wide_basis
            layer.delta.grad.copy_(gradient.to(basis.dtype) @ basis.T)

    def step_in_parts(self, deltas: Iterable[Tensor]) -> None:
        """Expect that these deltas are always stepped a few at a time, inside of `stepping`."""
        self._in_parts = set(deltas)

    @contextmanager
    def stepping(self, optimizer: Optimizer) -> Iterator[None]:
        """Let the optimizer step a few layers inside the block, ahead of the others.

        The optimizer must be narrowed to their deltas; see `lit_ft.optim.narrowed`. At the end of
        the block, the layers are folded and their bases move, as at the end of a whole step. The
        whole step comes later, and leaves these layers as they are.
        """
        for _, _, layer in self._stepped(optimizer):
            layer.store_delta()
        yield
        self._finish(optimizer)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        # After an overflow, a grad scaler still calls a fused optimizer, which skips the step.
        overflow = getattr(optimizer, "found_inf", None)
        if overflow is not None and overflow.item():
            self.begin_accumulation()
            self._release(self.layers.values())
            return
        self._finish(optimizer)
        if not self._finished:  # a training step without a loss
            return
        if self.step == 0:
            self._warn_of_idle_layers()
        self.tracker.advance(self.step)
        self.stats.end_step()
        self.step += 1
        self._finished.clear()
        self.tracker.prepare(self.step)

    @_without_autocast
    @torch.no_grad()
    def _finish(self, optimizer: Optimizer) -> None:
        """Fold the layers that have just been stepped, and move their bases if they are due."""
        stepped = self._stepped(optimizer)
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
            self._release([layer])
            self.tracker.move_if_due(optimizer, group, name, step=self.step)
            self._finished.add(name)

    def _release(self, layers: Iterable[SubspaceLayer]) -> None:
        if self.releases_deltas:
            for layer in layers:
                layer.release_delta()

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs in addition to the layers' own tensors."""
        return {"step": self.step, **self.tracker.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.step = state["step"]
        self.tracker.load_state_dict(state, step=self.step)
        # Not before attaching: an optimizer built later would hold all that requires a gradient.
        if self._attached:
            self.tracker.prepare(self.step)

    def stop(self) -> None:
        """Stop computing sketches, and make the weights trainable in place of the deltas.

        Deltas that were released stay so: `store_delta` gives one its memory.
        """
        self._attached = False
        self._in_parts.clear()
        self.stats.await_snapshot(None)
        for layer in self.layers.values():
            layer.basis.requires_grad_(False)
            if layer.delta.requires_grad:  # else frozen, or stopped before
                layer.weight.requires_grad_(True)
                layer.delta.requires_grad_(False)
            layer.clear_basis_input()

    def freeze_weights(self) -> None:
        """Undo `stop`: train the deltas in place of the weights again, except in frozen layers."""
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
            if layer.delta.requires_grad and name not in self._finished
        ]
        if idle:
            log.warning(
                "The first step's loss did not come through %d of the layers that move in "
                "subspaces: %s. Where a model uses a layer's weight and does not call the layer, "
                "the weight stands still: leave the layer out of the targets.",
                len(idle),
                ", ".join(idle[:4]) + ", ..." * (len(idle) > 4),
            )
