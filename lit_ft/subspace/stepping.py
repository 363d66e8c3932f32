"""What happens around an optimizer step: the fold behind it, and now and then a new basis."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lit_ft.rounding import keyed_generator
from lit_ft.subspace.layer import MATCH_ADAMW, SubspaceLayer
from lit_ft.subspace.moments import change_of_basis, rotate_moments
from lit_ft.subspace.observation import Observation, Stretch, overlap
from lit_ft.subspace.projectors import SVD, Evidence, Projector, SubspaceIteration
from lit_ft.subspace.refusals import (
    refuse_float16,
    refuse_non_finite,
    refuse_sharding,
    refuse_unfit,
)
from lit_ft.subspace.schedule import Refresh, Turns

log = logging.getLogger(__name__)

# Rounds of power iteration that take the random start to the data, one a step.
_START_ROUNDS = 3


def _without_autocast(method: Callable[..., None]) -> Callable[..., None]:
    """Of a step that is taken under autocast, as Lightning's manual optimization takes it."""

    @wraps(method)
    def exact(self: SubspaceStep, *args: Any, **kwargs: Any) -> None:
        device = next(iter(self.layers.values())).basis.device
        with torch.autocast(device.type, enabled=False):
            method(self, *args, **kwargs)

    return exact


class SubspaceStep:
    """Trains layers in subspaces with an ordinary optimizer.

    After the optimizer has stepped S, the step is folded into W and S is zero again; then the
    bases whose turn it is move, and the optimizer's moments with them.

    Args:
        layers: As from `inject`, by name.
        projector: Moves the bases.
        scale: α, a number, or "match_adamw" for `SubspaceLayer.matching_scale`: the learning rate
            then means what it means to AdamW on whole weights.
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
        if isinstance(scale, str) and scale != MATCH_ADAMW:
            raise ValueError(f"scale={scale}: give a number, or '{MATCH_ADAMW}'.")
        self.layers = dict(layers)
        self.projector = projector
        self.scale = scale
        self.compiled = compiled
        self.seed = seed
        self.all_reduce = all_reduce
        self.step = 0
        self._by_delta: dict[Tensor, str] = {}
        self._indices = {name: index for index, name in enumerate(self.layers)}
        self._memory: dict[str, dict[str, Tensor]] = {name: {} for name in self.layers}
        self._said: set[type] = set()
        self.observation = Observation(self.layers)
        self.turns = self._turns(refresh or Refresh())
        self._overlaps: dict[str, Tensor] = {}  # of the bases that move at this step
        self._attached = False

    def reschedule(self, refresh: Refresh) -> None:
        """Let the bases move when `refresh` says; call it while nothing trains."""
        turns = self._turns(refresh)
        if turns.refresh != self.turns.refresh:
            self.turns = turns

    def attach(self, optimizer: Optimizer) -> RemovableHandle:
        """Follow `optimizer`'s steps, until the handle that is returned is removed.

        Raises:
            ValueError: The optimizer does not hold the layers' deltas (it was built before
                `inject`), or cannot train what is zero before each step; or the projector needs
                whole gradients of a sharded weight, or a weight has become float16.
        """
        refuse_unfit(optimizer)
        for name, layer in self.layers.items():
            refuse_float16(name, layer.weight)
        refuse_sharding(self.layers, forms_gradients=self.projector.forms_gradients)
        held = {p for group in optimizer.param_groups for p in group["params"]}
        for name, layer in self.layers.items():
            if layer.delta not in held:
                raise ValueError(
                    f"The optimizer does not hold {name}.delta: build it after inject(), on the "
                    "parameters that require a gradient."
                )
        # Not before: sharding a model puts other parameters in place of those of `inject`.
        self._by_delta = {layer.delta: name for name, layer in self.layers.items()}
        self._attached = True
        self._prepare()
        return optimizer.register_step_post_hook(self._after_step)

    def begin_window(self) -> None:
        """Forget the evidence of a step that was skipped; call it where gradients are zeroed."""
        for layer in self.layers.values():
            layer.forget_evidence()

    @_without_autocast
    @torch.no_grad()
    def before_step(self, optimizer: Optimizer, *, skips_overflow: bool = False) -> None:
        """Check the gradients and take the bases that come from G itself.

        Call it when the gradients are complete, and unscaled if a grad scaler scales them.

        Args:
            optimizer: Whose step comes next.
            skips_overflow: A grad scaler skips the step if a gradient is not finite.

        Raises:
            FloatingPointError: A gradient is not finite; names the layers. Nothing has changed.
        """
        if not skips_overflow:
            refuse_non_finite(
                {name: layer.delta.grad for _, name, layer in self._stepped(optimizer)}, self.step
            )
        for group, name, layer in self._stepped(optimizer):
            gradient = layer.weight.grad
            if gradient is None and self.all_reduce is not None and layer.weight.requires_grad:
                gradient = torch.zeros_like(layer.weight)
            if gradient is None:
                continue
            layer.weight.grad = None
            if self.all_reduce is not None:
                self.all_reduce([gradient])
            gradient = gradient.mT if layer.views_transposed else gradient
            rule: Projector = SVD()  # or the first basis of a rule that starts from one
            if self.projector.evidence is Evidence.GRADIENT:
                rule = self.projector
            self._move(optimizer, group, name, layer, rule, gradient)
            assert layer.delta.grad is not None
            layer.delta.grad.copy_(gradient.to(layer.basis.dtype) @ layer.basis.T)

    @_without_autocast
    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        # A grad scaler leaves it to a fused optimizer to take no step after an overflow.
        overflow = getattr(optimizer, "found_inf", None)
        if overflow is not None and overflow.item():
            self.begin_window()
            return
        self._reduce_evidence(optimizer)
        if self.step == 0:
            self._warn_of_idle_layers()
        for group, name, layer in self._stepped(optimizer):
            scale = layer.matching_scale if isinstance(self.scale, str) else self.scale
            self.observation.see_step(name, scale=scale, lr=group["lr"])
            layer.fold(
                scale=scale,
                decay=group["lr"] * group.get("weight_decay", 0.0),
                rounding_key=(self.seed, self.step, self._indices[name]),
            )
            evidence = self._evidence(name)
            if evidence is Evidence.SKETCH and layer.basis.grad is not None:
                starting = self.step < _START_ROUNDS and not self.projector.starts_from_svd
                rule: Projector = SubspaceIteration() if starting else self.projector
                self._move(optimizer, group, name, layer, rule, layer.basis.grad)
            elif evidence is Evidence.NOTHING and self.turns.is_due(name, self.step):
                self._move(optimizer, group, name, layer, self.projector, None)
            layer.forget_evidence()
        self._pass_turns_on()
        self.observation.end_step()
        self.step += 1
        self._prepare()

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs beside the layers' own tensors."""
        return {"step": self.step, "memory": self._memory, "turns": self.turns.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.step = state["step"]
        self._memory = {
            name: {
                key: value.to(self.layers[name].basis.device) if value.ndim else value
                for key, value in memory.items()
            }
            for name, memory in state["memory"].items()
        }
        self.turns.load_state_dict(state["turns"], self.step)
        if self._attached:  # an optimizer that is built later would take what asks for a gradient
            self._prepare()

    def stop(self) -> None:
        """Ask for no more sketches or gradients."""
        self._attached = False
        self.observation.await_reading(None)
        for layer in self.layers.values():
            layer.basis.requires_grad_(False)
            layer.weight.requires_grad_(False)
            layer.forget_evidence()

    def _reduce_evidence(self, optimizer: Optimizer) -> None:
        """Average over the ranks what the moves will look at."""
        if self.all_reduce is None:
            return
        evidence = []
        for _, _, layer in self._stepped(optimizer):
            if layer.basis.requires_grad:
                if layer.basis.grad is None:  # this rank's rows did not come through the layer
                    layer.basis.grad = torch.zeros_like(layer.basis)
                evidence.append(layer.basis.grad)
        self.all_reduce(evidence)

    def _stepped(self, optimizer: Optimizer) -> list[tuple[dict[str, Any], str, SubspaceLayer]]:
        return [
            (group, self._by_delta[p], self.layers[self._by_delta[p]])
            for group in optimizer.param_groups
            for p in group["params"]
            if p in self._by_delta and p.grad is not None
        ]

    def _move(
        self,
        optimizer: Optimizer,
        group: dict[str, Any],
        name: str,
        layer: SubspaceLayer,
        rule: Projector,
        evidence: Tensor | None,
    ) -> None:
        measured = self._is_measured(name)
        move = Stretch(layer.basis.device) if measured else None
        moved = rule.move(
            layer.basis.detach(),
            evidence,
            state=self._memory[name],
            decay=group["lr"] / group.get("initial_lr", group["lr"]) if group["lr"] else 0.0,
            generator=keyed_generator(
                layer.basis.device, self.seed, self.step, self._indices[name], 1
            ),
        )
        if self.projector.rotates_moments:
            rotation = change_of_basis(layer.basis.detach(), moved)
            rotation = rotation.to(layer.delta.device)  # where offloaded moments are
            if not rotate_moments(optimizer.state[layer.delta], group, rotation):
                self._say_once(optimizer)
        if move is not None:
            self._overlaps[name] = turned = overlap(layer.basis.detach(), moved)
            self.observation.see_move(name, turned=turned, move=move.end())
        layer.basis.copy_(moved)

    def _is_measured(self, name: str) -> bool:
        """Whether the schedule or the coming reading looks at the layer's move at this step."""
        if self.turns.refresh.adaptive:
            return True
        remaining = self.observation.steps_to_reading
        if remaining is None:
            return False
        # Of a layer's moves before a reading the last one counts.
        starting_still = self._is_starting and self.step + 1 < _START_ROUNDS
        next_move = self.step + 1 if starting_still else self.turns.after(name, self.step)
        return next_move >= self.step + remaining

    def _pass_turns_on(self) -> None:
        seen: dict[str, float] = {}
        if self.turns.refresh.adaptive and self._overlaps and not self._is_starting:
            values = torch.stack(list(self._overlaps.values()))
            if self.all_reduce is not None:  # no rank may come to another decision
                self.all_reduce([values])
            seen = dict(zip(self._overlaps, values.tolist(), strict=True))
        self._overlaps.clear()
        self.turns.pass_on(self.step, seen)

    def _prepare(self) -> None:
        """Ask the coming window for what its moves will look at."""
        for name, layer in self.layers.items():
            evidence = self._evidence(name)
            layer.basis.requires_grad_(evidence is Evidence.SKETCH)
            layer.weight.requires_grad_(evidence is Evidence.GRADIENT)

    def _evidence(self, name: str) -> Evidence:
        if self.step == 0 and self.projector.starts_from_svd:
            return Evidence.GRADIENT
        due = self._is_starting or self.turns.is_due(name, self.step)
        return self.projector.evidence if due else Evidence.NOTHING

    @property
    def _is_starting(self) -> bool:
        """Whether the bases are still on their way from the random start to the data."""
        return self.step < _START_ROUNDS and self.projector.evidence is Evidence.SKETCH

    def _turns(self, refresh: Refresh) -> Turns:
        if self.compiled and refresh.adaptive:
            raise ValueError(
                "Of a compiled model the bases move together, and adaptive=True lets each have its "
                "own turns, with a graph for each set of them: leave out one of the two."
            )
        if self.compiled:
            refresh = replace(refresh, stagger=False)
        # The gradient at hand is projected with the basis that it gives: from step 0 on.
        at_once = self.projector.evidence is Evidence.GRADIENT
        every = self.projector.every
        return Turns(list(self.layers), refresh, every=every, at_once=at_once, step=self.step)

    def _warn_of_idle_layers(self) -> None:
        idle = [name for name, layer in self.layers.items() if layer.delta.grad is None]
        if idle:
            log.warning(
                "The first step's loss did not come through %d of the layers that move in "
                "subspaces: %s. Where a model takes a layer's weight and does not call the layer, "
                "the weight stands still: leave it out of the targets.",
                len(idle),
                ", ".join(idle[:4]) + ", ..." * (len(idle) > 4),
            )

    def _say_once(self, optimizer: Optimizer) -> None:
        if type(optimizer) not in self._said:
            self._said.add(type(optimizer))
            log.warning(
                "The state of %s has no rule for a change of basis: it is left as it is.",
                type(optimizer).__name__,
            )
