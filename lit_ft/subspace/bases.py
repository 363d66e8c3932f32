"""The bases of the layers: whose turn it is, by which rule it moves, and the moments with it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_ft.rounding import keyed_generator
from lit_ft.subspace.layer import SubspaceLayer
from lit_ft.subspace.moments import change_of_basis, rotate_moments
from lit_ft.subspace.observation import Observation, Stretch, overlap
from lit_ft.subspace.projectors import SVD, Evidence, Projector, SubspaceIteration
from lit_ft.subspace.schedule import Refresh, Turns

log = logging.getLogger(__name__)

# Rounds of power iteration that take the random start to the data, one a step.
_START_ROUNDS = 3


class Bases:
    """Moves bases, step by step; the arguments are those of `SubspaceStep`.

    `step` is everywhere the optimizer step, from 0, that is being taken or comes next.
    """

    def __init__(
        self,
        layers: Mapping[str, SubspaceLayer],
        projector: Projector,
        *,
        refresh: Refresh,
        compiled: bool,
        seed: int,
        all_reduce: Callable[[Sequence[Tensor]], None] | None,
        observation: Observation,
    ) -> None:
        self.layers = layers
        self.projector = projector
        self.compiled = compiled
        self.seed = seed
        self.all_reduce = all_reduce
        self.observation = observation
        self.turns = self._turns(refresh, step=0)
        self._indices = {name: index for index, name in enumerate(layers)}
        self._memory: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
        self._overlaps: dict[str, Tensor] = {}  # of the bases that move at this step
        self._said: set[type] = set()

    def reschedule(self, refresh: Refresh, *, step: int) -> None:
        """Let the bases move when `refresh` says."""
        turns = self._turns(refresh, step=step)
        if turns.refresh != self.turns.refresh:
            self.turns = turns

    def prepare(self, step: int) -> None:
        """Ask the coming window for what its moves will look at."""
        for name, layer in self.layers.items():
            evidence = self._evidence(name, step)
            layer.basis.requires_grad_(evidence is Evidence.SKETCH)
            layer.weight.requires_grad_(evidence is Evidence.GRADIENT)

    def reduce_evidence(self, layers: Iterable[SubspaceLayer]) -> None:
        """Average over the ranks what the moves of these layers will look at."""
        if self.all_reduce is None:
            return
        evidence = []
        for layer in layers:
            if layer.basis.requires_grad:
                if layer.basis.grad is None:  # this rank's rows did not come through the layer
                    layer.basis.grad = torch.zeros_like(layer.basis)
                evidence.append(layer.basis.grad)
        self.all_reduce(evidence)

    def move_to_gradient(
        self, optimizer: Optimizer, group: dict[str, Any], name: str, gradient: Tensor, *, step: int
    ) -> None:
        """Take the layer's basis from its whole gradient, before a step."""
        rule: Projector = SVD()  # or the first basis of a rule that starts from one
        if self.projector.evidence is Evidence.GRADIENT:
            rule = self.projector
        self._move(optimizer, group, name, rule, gradient, step=step)

    def move_if_due(
        self, optimizer: Optimizer, group: dict[str, Any], name: str, *, step: int
    ) -> None:
        """Move the layer's basis after a step, by its sketch or by nothing, and forget the former.

        Args:
            optimizer: Whose moments follow.
            group: The optimizer's, that the layer is in.
            name: The layer's.
            step: That was taken.
        """
        evidence, layer = self._evidence(name, step), self.layers[name]
        if evidence is Evidence.SKETCH and layer.basis.grad is not None:
            starting = step < _START_ROUNDS and not self.projector.starts_from_svd
            rule: Projector = SubspaceIteration() if starting else self.projector
            self._move(optimizer, group, name, rule, layer.basis.grad, step=step)
        elif evidence is Evidence.NOTHING and self.turns.is_due(name, step):
            self._move(optimizer, group, name, self.projector, None, step=step)
        layer.forget_evidence()

    def pass_turns_on(self, step: int) -> None:
        """End `step`: who has moved waits for the next turn."""
        seen: dict[str, float] = {}
        if self.turns.refresh.adaptive and self._overlaps and not self._is_starting(step):
            values = torch.stack(list(self._overlaps.values()))
            if self.all_reduce is not None:  # no rank may come to another decision
                self.all_reduce([values])
            seen = dict(zip(self._overlaps, values.tolist(), strict=True))
        self._overlaps.clear()
        self.turns.pass_on(step, seen)

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs beside the bases themselves."""
        return {"memory": self._memory, "turns": self.turns.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], *, step: int) -> None:
        """Continue from `state_dict`."""
        self._memory = {
            name: {
                key: value.to(self.layers[name].basis.device) if value.ndim else value
                for key, value in memory.items()
            }
            for name, memory in state["memory"].items()
        }
        self.turns.load_state_dict(state["turns"], step)

    def _move(
        self,
        optimizer: Optimizer,
        group: dict[str, Any],
        name: str,
        rule: Projector,
        evidence: Tensor | None,
        *,
        step: int,
    ) -> None:
        layer = self.layers[name]
        measured = self._is_measured(name, step)
        move = Stretch(layer.basis.device) if measured else None
        moved = rule.move(
            layer.basis.detach(),
            evidence,
            state=self._memory[name],
            decay=group["lr"] / group.get("initial_lr", group["lr"]) if group["lr"] else 0.0,
            generator=keyed_generator(layer.basis.device, self.seed, step, self._indices[name], 1),
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

    def _is_measured(self, name: str, step: int) -> bool:
        """Whether the schedule or the coming reading looks at the layer's move at this step."""
        if self.turns.refresh.adaptive:
            return True
        remaining = self.observation.steps_to_reading
        if remaining is None:
            return False
        # Of a layer's moves before a reading the last one counts.
        starting_still = self._is_starting(step) and step + 1 < _START_ROUNDS
        next_move = step + 1 if starting_still else self.turns.after(name, step)
        return next_move >= step + remaining

    def _evidence(self, name: str, step: int) -> Evidence:
        if step == 0 and self.projector.starts_from_svd:
            return Evidence.GRADIENT
        due = self._is_starting(step) or self.turns.is_due(name, step)
        return self.projector.evidence if due else Evidence.NOTHING

    def _is_starting(self, step: int) -> bool:
        """Whether the bases are still on their way from the random start to the data."""
        return step < _START_ROUNDS and self.projector.evidence is Evidence.SKETCH

    def _turns(self, refresh: Refresh, *, step: int) -> Turns:
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
        return Turns(list(self.layers), refresh, every=every, at_once=at_once, step=step)

    def _say_once(self, optimizer: Optimizer) -> None:
        if type(optimizer) not in self._said:
            self._said.add(type(optimizer))
            log.warning(
                "The state of %s has no rule for a change of basis: it is left as it is.",
                type(optimizer).__name__,
            )
