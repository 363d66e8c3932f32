"""What happens around an optimizer step: the fold behind it, and now and then a new basis."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lit_ft.rounding import keyed_generator
from lit_ft.subspace.layer import MATCH_ADAMW, SubspaceLayer
from lit_ft.subspace.moments import change_of_basis, rotate_moments
from lit_ft.subspace.projectors import SVD, Evidence, Online, Projector, SubspaceIteration

log = logging.getLogger(__name__)

# Rounds of power iteration that take the random start to the data, one a step.
_START_ROUNDS = 2

# What the optimizer's own step must not depend on: S is zero before it.
_NEEDS_THE_WEIGHT = {
    "Adafactor": "torch.optim.Adafactor scales its step by the parameter's size: use transformers' "
    "Adafactor with scale_parameter=False, or AdamW",
    "LBFGS": "LBFGS keeps copies of the parameters: use AdamW",
    "LARS": "LARS scales its step by the parameter's norm: use AdamW",
    "LAMB": "LAMB scales its step by the parameter's norm: use AdamW",
    "Prodigy": "Prodigy measures the distance from the first parameters: use AdamW",
    "ScheduleFree": "schedule-free optimizers keep copies of the parameters: use AdamW",
}


class SubspaceStep:
    """Trains layers in subspaces with an ordinary optimizer.

    After the optimizer has stepped S, the step is folded into W and S is zero again; then the
    bases whose turn it is move, and the optimizer's moments with them.

    Args:
        layers: As from `inject`, by name.
        projector: Moves the bases.
        scale: α, a number, or "match_adamw" for √(cols / r): the learning rate then means what it
            means to AdamW on whole weights.
        stagger: Spread the layers' moves over the interval, so that no step pays for all.
        seed: Of random bases and of stochastic rounding.
        all_reduce: Averages a tensor over data-parallel ranks, in place; None for one process.
    """

    def __init__(
        self,
        layers: Mapping[str, SubspaceLayer],
        projector: Projector,
        *,
        scale: float | str = MATCH_ADAMW,
        stagger: bool = True,
        seed: int = 0,
        all_reduce: Callable[[Tensor], None] | None = None,
    ) -> None:
        if isinstance(scale, str) and scale != MATCH_ADAMW:
            raise ValueError(f"scale={scale}: give a number, or '{MATCH_ADAMW}'.")
        self.layers = dict(layers)
        self.projector = projector
        self.scale = scale
        self.stagger = stagger
        self.seed = seed
        self.all_reduce = all_reduce
        self.step = 0
        self._by_delta = {layer.delta: name for name, layer in self.layers.items()}
        self._indices = {name: index for index, name in enumerate(self.layers)}
        self._memory: dict[str, dict[str, Tensor]] = {name: {} for name in self.layers}
        self._said: set[type] = set()
        self._attached = False

    def attach(self, optimizer: Optimizer) -> RemovableHandle:
        """Follow `optimizer`'s steps, until the handle that is returned is removed.

        Raises:
            ValueError: The optimizer does not hold the layers' deltas (it was built before
                `inject`), or cannot train what is zero before each step.
        """
        refuse_unfit(optimizer)
        held = {p for group in optimizer.param_groups for p in group["params"]}
        for name, layer in self.layers.items():
            if layer.delta not in held:
                raise ValueError(
                    f"The optimizer does not hold {name}.delta: build it after inject(), on the "
                    "parameters that require a gradient."
                )
        self._attached = True
        self._prepare()
        return optimizer.register_step_post_hook(self._after_step)

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        """Take the bases that come from G itself; call it when the gradients are complete."""
        for group, name, layer in self._stepped(optimizer):
            if layer.weight.grad is None:
                continue
            gradient = layer.weight.grad
            layer.weight.grad = None
            gradient = gradient.mT if layer.views_transposed else gradient
            if self.all_reduce is not None:
                self.all_reduce(gradient)
            rule: Projector = SVD()  # or the first basis of a rule that starts from one
            if self.projector.evidence is Evidence.GRADIENT:
                rule = self.projector
            self._move(optimizer, group, name, layer, rule, gradient)
            assert layer.delta.grad is not None
            layer.delta.grad.copy_(gradient.to(layer.basis.dtype) @ layer.basis.T)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        for group, name, layer in self._stepped(optimizer):
            index = self._indices[name]
            layer.fold(
                scale=layer.matching_scale if isinstance(self.scale, str) else self.scale,
                decay=group["lr"] * group.get("weight_decay", 0.0),
                generator=keyed_generator(layer.weight.device, self.seed, self.step, index)
                if layer.weight.dtype is not layer.delta.dtype
                else None,
            )
            evidence = self._evidence(name)
            if evidence is Evidence.SKETCH and layer.basis.grad is not None:
                if self.all_reduce is not None:
                    self.all_reduce(layer.basis.grad)
                starting = self.step < _START_ROUNDS and not self._starts_from_svd
                rule: Projector = SubspaceIteration() if starting else self.projector
                self._move(optimizer, group, name, layer, rule, layer.basis.grad)
            elif evidence is Evidence.NOTHING and self._is_due(name):
                self._move(optimizer, group, name, layer, self.projector, None)
            layer.basis.grad = None
        self.step += 1
        self._prepare()

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs beside the layers' own tensors."""
        return {"step": self.step, "memory": self._memory}

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
        if self._attached:  # an optimizer that is built later would take what asks for a gradient
            self._prepare()

    def stop(self) -> None:
        """Ask for no more sketches or gradients."""
        self._attached = False
        for layer in self.layers.values():
            layer.basis.requires_grad_(False)
            layer.weight.requires_grad_(False)
            layer.basis.grad = layer.weight.grad = None

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
            if not rotate_moments(optimizer.state[layer.delta], group, rotation):
                self._say_once(optimizer)
        layer.basis.copy_(moved)

    def _prepare(self) -> None:
        """Ask the coming window for what its moves will look at."""
        for name, layer in self.layers.items():
            evidence = self._evidence(name)
            layer.basis.requires_grad_(evidence is Evidence.SKETCH)
            layer.weight.requires_grad_(evidence is Evidence.GRADIENT)

    def _evidence(self, name: str) -> Evidence:
        if self.step == 0 and self._starts_from_svd:
            return Evidence.GRADIENT
        evidence = self.projector.evidence
        starting = self.step < _START_ROUNDS and evidence is Evidence.SKETCH
        return evidence if starting or self._is_due(name) else Evidence.NOTHING

    def _is_due(self, name: str) -> bool:
        every = self.projector.every
        offset = self._indices[name] * every // len(self.layers) if self.stagger else 0
        if self.projector.evidence is Evidence.GRADIENT:
            # The gradient at hand is projected with the basis that it gives: from step 0 on.
            return self.step == 0 or (self.step > offset and (self.step - offset) % every == 0)
        return (self.step + 1 - offset) % every == 0

    @property
    def _starts_from_svd(self) -> bool:
        return isinstance(self.projector, Online) and self.projector.starts_from_svd

    def _say_once(self, optimizer: Optimizer) -> None:
        if type(optimizer) not in self._said:
            self._said.add(type(optimizer))
            log.warning(
                "The state of %s has no rule for a change of basis: it is left as it is.",
                type(optimizer).__name__,
            )


def refuse_unfit(optimizer: Optimizer) -> None:
    """Raise ValueError for an optimizer whose step has no meaning on parameters that are zero."""
    for kind in type(optimizer).__mro__:
        reason = next(
            (r for n, r in _NEEDS_THE_WEIGHT.items() if kind.__name__.startswith(n)), None
        )
        if reason and not (kind.__name__ == "Adafactor" and kind.__module__.startswith("transf")):
            raise ValueError(f"GaLore cannot train with this optimizer: {reason}.")
    for group in optimizer.param_groups:
        if group.get("scale_parameter"):
            raise ValueError(
                "Adafactor scales its step by the parameter's size, and a subspace parameter is "
                "zero: set scale_parameter=False and relative_step=False, with a learning rate."
            )
        decoupled = group.get(
            "decoupled_weight_decay", type(optimizer).__name__ not in ("Adam", "SGD")
        )
        if group.get("weight_decay") and not decoupled:
            raise ValueError(
                f"{type(optimizer).__name__} adds weight decay to the gradient, and a subspace "
                "parameter is zero: set weight_decay=0, or use AdamW."
            )
