"""Move the layers' bases when they are due, and let the optimizer's moments follow."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_ft.compat import remedies
from lit_ft.compat.optimizers import traits_of
from lit_ft.compat.refusal import Refusal
from lit_ft.subspace.layers.base import SubspaceLayer
from lit_ft.subspace.moments import change_of_basis, rotate_moments
from lit_ft.subspace.projectors import SVD, BasisInput, Projector, SubspaceIteration
from lit_ft.subspace.schedule import Refresh, RefreshSchedule
from lit_ft.subspace.stats import DeviceTimer, SubspaceStats, overlap
from lit_ft.tensors.stochastic_rounding import keyed_generator

log = logging.getLogger(__name__)

# The number of moves, one per step, in which power iteration fits a random basis to the data.
_START_ROUNDS = 3


class BasisTracker:
    """Moves each layer's basis at the steps at which it is due.

    The arguments are those of `SubspaceUpdater`, plus `stats`, which records the moves. In every
    method, `step` is the current or next optimizer step, counted from 0.
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
        stats: SubspaceStats,
    ) -> None:
        self.layers = layers
        self.projector = projector
        self.compiled = compiled
        self.seed = seed
        self.all_reduce = all_reduce
        self.stats = stats
        self.schedule = self._schedule_for(refresh, step=0)
        self._indices = {name: index for index, name in enumerate(layers)}
        self._memory: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
        in_rounds = projector.basis_input is BasisInput.SKETCH
        self._starts = dict.fromkeys(layers, _START_ROUNDS if in_rounds else 0)  # rounds to come
        self._moved: dict[str, Tensor | None] = {}  # at this step, with the overlap if measured
        self._said: set[type] = set()

    def reschedule(self, refresh: Refresh, *, step: int) -> None:
        """Follow `refresh` from `step` on; if it changes nothing, each layer keeps its turn."""
        schedule = self._schedule_for(refresh, step=step)
        if schedule.refresh != self.schedule.refresh:
            self.schedule = schedule

    def prepare(self, step: int) -> None:
        """Make the backward passes of `step` record what the moves of bases at that step need."""
        for name, layer in self.layers.items():
            frozen = not (layer.delta.requires_grad or layer.weight.requires_grad)
            basis_input = BasisInput.NOTHING if frozen else self.basis_input(name, step)
            layer.record_sketches(basis_input is BasisInput.SKETCH)
            layer.weight.requires_grad_(basis_input is BasisInput.GRADIENT)

    def reduce_basis_inputs(self, layers: Iterable[SubspaceLayer]) -> None:
        """Average the sketches of these layers over the ranks."""
        if self.all_reduce is None:
            return
        basis_input = []
        for layer in layers:
            if layer.basis.requires_grad:
                if layer.basis.grad is None:  # none of this rank's rows went through the layer
                    layer.basis.grad = torch.zeros_like(layer.basis, dtype=layer.basis.grad_dtype)
                basis_input.append(layer.basis.grad)
        self.all_reduce(basis_input)

    def basis_input(self, name: str, step: int) -> BasisInput:
        """Return what a move of the layer at `step` needs, or NOTHING if no move is due."""
        if self._starts[name] == _START_ROUNDS and self.projector.starts_from_svd:
            return BasisInput.GRADIENT
        due = self._starts[name] > 0 or self.schedule.is_due(name, step)
        return self.projector.basis_input if due else BasisInput.NOTHING

    def move_to_gradient(
        self, optimizer: Optimizer, group: dict[str, Any], name: str, gradient: Tensor, *, step: int
    ) -> None:
        """Before a step, compute the layer's basis from its whole gradient [rows, cols]."""
        rule: Projector = SVD()  # for the first basis of a rule that starts from an SVD
        if self.projector.basis_input is BasisInput.GRADIENT:
            rule = self.projector
        self._move(optimizer, group, name, rule, gradient, step=step)

    def move_if_due(
        self, optimizer: Optimizer, group: dict[str, Any], name: str, *, step: int
    ) -> None:
        """After a step, move the layer's basis if it is due, and clear what backward has recorded.

        Moves that need the whole gradient are not made here, but by `move_to_gradient` before the
        step.

        Args:
            optimizer: The optimizer that steps the layer's delta. Its moments follow the basis.
            group: The optimizer's parameter group that holds the layer's delta.
            name: The name of the layer.
            step: The optimizer step that was just taken.
        """
        basis_input, layer = self.basis_input(name, step), self.layers[name]
        if basis_input is BasisInput.SKETCH and layer.basis.grad is not None:
            starting = self._starts[name] and not self.projector.starts_from_svd
            rule: Projector = SubspaceIteration() if starting else self.projector
            self._move(optimizer, group, name, rule, layer.basis.grad, step=step)
        elif basis_input is BasisInput.NOTHING and self.schedule.is_due(name, step):
            self._move(optimizer, group, name, self.projector, None, step=step)
        layer.clear_basis_input()

    def advance(self, step: int) -> None:
        """End `step`, and set the next turn of each layer that moved in it."""
        overlaps = {name: seen for name, seen in self._moved.items() if seen is not None}
        starting = any(self._starts[name] for name in self._moved)
        rests: dict[str, float] = dict.fromkeys(self._moved, 0.0)
        if self.schedule.refresh.adaptive and overlaps and not starting:
            values = torch.stack(list(overlaps.values()))
            if self.all_reduce is not None:  # all ranks must decide alike
                self.all_reduce([values])
            rests |= zip(overlaps, values.tolist(), strict=True)
        for name in self._moved:
            self._starts[name] = max(self._starts[name] - 1, 0)
        self._moved.clear()
        self.schedule.advance(step, rests)

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs in addition to the bases themselves."""
        schedule = self.schedule.state_dict()
        return {"memory": self._memory, "turns": schedule, "starts": dict(self._starts)}

    def load_state_dict(self, state: Mapping[str, Any], *, step: int) -> None:
        """Continue at `step` from what `state_dict` returned."""
        self._memory = {name: dict(memory) for name, memory in state["memory"].items()}
        self._starts = dict(state["starts"])
        self.schedule.load_state_dict(state["turns"], step)

    def _move(
        self,
        optimizer: Optimizer,
        group: dict[str, Any],
        name: str,
        rule: Projector,
        basis_input: Tensor | None,
        *,
        step: int,
    ) -> None:
        layer, memory = self.layers[name], self._memory[name]
        old, device = layer.wide_basis, layer.basis.device
        key = (self.seed, step, self._indices[name])
        # When a run resumes, this memory is loaded before Lightning moves the module to its device.
        memory |= {k: v.to(old) for k, v in memory.items() if v.ndim}
        measured = self._is_measured(name, step)
        move = DeviceTimer(device) if measured else None
        moved = rule.move(
            old,
            basis_input,
            state=memory,
            decay=_share_of_peak(group),
            generator=keyed_generator(device, *key, 1),
        )
        rounded = layer.as_basis(moved, generator=keyed_generator(device, *key, 2))
        moved = rounded.to(old.dtype)
        if self.projector.rotates_moments:
            rotation = change_of_basis(old, moved)
            rotation = rotation.to(layer.delta.device)  # where the moments are, if offloaded
            moments = traits_of(type(optimizer)).moments
            state = optimizer.state[layer.delta]
            if not rotate_moments(state, group, rotation, moments=moments):
                self._say_once(optimizer)
        self._moved[name] = None
        if move is not None:
            self._moved[name] = turned = overlap(old, moved)
            self.stats.record_move(name, turned=turned, move=move.end())
        layer.basis.copy_(rounded)

    def _is_measured(self, name: str, step: int) -> bool:
        """Whether the schedule or the next snapshot uses the layer's move at this step."""
        if self.schedule.refresh.adaptive:
            return True
        remaining = self.stats.steps_to_snapshot
        if remaining is None:
            return False
        # Only a layer's last move before a snapshot counts.
        next_move = step + 1 if self._starts[name] > 1 else self.schedule.after(name, step)
        return next_move >= step + remaining

    def _schedule_for(self, refresh: Refresh, *, step: int) -> RefreshSchedule:
        if self.compiled and refresh.adaptive:
            raise ValueError(
                "The bases of a compiled model move together, and adaptive=True gives each layer "
                "its own schedule, with a graph for each set of layers that move: leave out one of "
                "the two."
            )
        if refresh.adaptive and not self.projector.renews:
            name = type(self.projector).__name__
            raise Refusal(
                "adaptive=True makes a layer wait after a move that hardly turns its basis, and "
                f"the small steps of {name} hardly ever turn one",
                remedies.RENEWED_BASES,
                remedies.NOT_ADAPTIVE,
            )
        if self.compiled:
            refresh = replace(refresh, stagger=False)
        # Such rules project each gradient with the basis computed from it, from step 0 on.
        at_once = self.projector.basis_input is BasisInput.GRADIENT
        every = self.projector.every
        return RefreshSchedule(list(self.layers), refresh, every=every, at_once=at_once, step=step)

    def _say_once(self, optimizer: Optimizer) -> None:
        if type(optimizer) not in self._said:
            self._said.add(type(optimizer))
            log.warning(
                "The state of %s has no rule for a change of basis: it stays in the coordinates of "
                "the old basis.",
                type(optimizer).__name__,
            )


def _share_of_peak(group: dict[str, Any]) -> float:
    """Return the group's learning rate as a fraction of its schedule's peak."""
    # OneCycleLR starts from `initial_lr` and goes up to `max_lr`.
    peak = max(group["lr"], group.get("initial_lr", 0), group.get("max_lr", 0))
    return float(group["lr"] / peak) if peak else 0.0
