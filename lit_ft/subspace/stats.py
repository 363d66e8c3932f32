"""Measure subspaces while they train, without waiting for the device at each step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_ft.subspace.layers.base import SubspaceLayer
from lit_ft.tensors.sharding import full_tensor


def overlap(old: Tensor, new: Tensor) -> Tensor:
    """Return how much of the span of `old` lies in the span of `new`: tr(Π_old Π_new) / r.

    Π is the orthogonal projection onto a span. The result is a scalar, the mean squared cosine of
    the principal angles between the two spans. It is 1 for equal spans and about r / n for random
    ones. For orthonormal rows it equals ||P_old P_newᵀ||² / r.

    Args:
        old: The old basis P_old [r, n], with linearly independent rows.
        new: The new basis P_new [r, n], with linearly independent rows.
    """
    crossed = old @ new.T
    # `solve` would wait for the device to report success.
    in_old = torch.linalg.solve_ex(old @ old.T, crossed).result
    in_new = torch.linalg.solve_ex(new @ new.T, crossed.T).result
    share: Tensor = (in_old * in_new.T).sum() / len(old)
    return share


def squared_update(delta: Tensor, basis: Tensor) -> Tensor:
    """Return the scalar ||S P||² for S [rows, r] and P [r, n]; for orthonormal P it is ||S||²."""
    return (delta @ (basis @ basis.T) * delta).sum()


@dataclass(frozen=True)
class Snapshot:
    """The measurements since the last snapshot, as plain numbers, keyed by the names of layers.

    Attributes:
        energies: For each layer, the gradient energy that its basis captured at the last step, and
            the total gradient energy; see `energy.captured_and_total_energy`.
        overlaps: The overlap of the last two bases, for each layer whose basis moved.
        seconds: The time in seconds of the last move of the basis, for each layer whose basis
            moved. It is measured on this process, and includes the change of the optimizer's
            moments.
        step_rms: The root mean square of what the last step added to the weights, without weight
            decay, divided by the learning rate; None if nothing was stepped.
    """

    energies: dict[str, tuple[float, float]]
    overlaps: dict[str, float]
    seconds: dict[str, float]
    step_rms: float | None


class SubspaceStats:
    """Collects measurements on the device until `snapshot` returns them.

    The size of the update and the gradient energies are measured only at the last step before a
    snapshot, because the energies need products of [tokens, tokens] matrices. Of each layer's
    moves, only the last one is kept.

    Args:
        layers: The layers to measure, keyed by name.
    """

    def __init__(self, layers: Mapping[str, SubspaceLayer]) -> None:
        self._layers = layers
        self.steps_to_snapshot: int | None = None
        self._clear()

    def _clear(self) -> None:
        self._energies: dict[str, Tensor] = {}
        self._overlaps: dict[str, Tensor] = {}
        self._moves: dict[str, DeviceTimer] = {}
        self._squared_steps: list[Tensor] = []
        self._num_weights = 0

    def await_snapshot(self, steps: int | None) -> None:
        """Expect the next snapshot after `steps` more steps, at least 1; None expects none."""
        self.steps_to_snapshot = steps
        for layer in self._layers.values():
            layer.energy.requires_grad_(steps == 1)

    def record_step(self, name: str, *, scale: float, lr: float) -> None:
        """Measure one layer's step. Call this before the step is folded into the weight.

        Only the last step before a snapshot is measured; other calls do nothing.

        Args:
            name: The name of the layer.
            scale: The scale α with which the step is folded into the weight.
            lr: The learning rate of the step.
        """
        if self.steps_to_snapshot != 1:
            return
        layer = self._layers[name]
        # It is None if none of this rank's rows went through the layer.
        energy = layer.energy.grad
        self._energies[name] = torch.zeros_like(layer.energy) if energy is None else energy
        if lr:
            basis = layer.wide_basis
            squared = squared_update(full_tensor(layer.delta).to(basis.device), basis)
            self._squared_steps.append(squared * (scale / lr) ** 2)
            self._num_weights += layer.weight.numel()

    def record_move(self, name: str, *, turned: Tensor, move: DeviceTimer) -> None:
        """Record a move of a basis.

        Args:
            name: The name of the layer.
            turned: The overlap of the old and the new basis, a scalar.
            move: The timer of the move, which has ended.
        """
        self._overlaps[name], self._moves[name] = turned, move

    def end_step(self) -> None:
        """Count down the steps to the next snapshot."""
        if self.steps_to_snapshot is not None:
            self.await_snapshot(self.steps_to_snapshot - 1 or None)

    def snapshot(self, all_reduce: Callable[[Sequence[Tensor]], None] | None) -> Snapshot:
        """Return the measurements since the last snapshot, after waiting for the device once.

        Args:
            all_reduce: A function that averages tensors over the ranks in place; None for one
                process. With it, every rank must call this method.
        """
        tensors = [*self._energies.values(), *self._overlaps.values(), *self._squared_steps]
        values: list[float] = []
        if tensors:
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            if all_reduce is not None:
                all_reduce([flat])
            values = flat.tolist()
        numbers = iter(values)
        snapshot = Snapshot(
            energies={name: (next(numbers), next(numbers)) for name in self._energies},
            overlaps={name: next(numbers) for name in self._overlaps},
            # These moves have ended, because the host has just waited for later values.
            seconds={name: move.seconds() for name, move in self._moves.items()},
            step_rms=(sum(numbers) / self._num_weights) ** 0.5 if self._num_weights else None,
        )
        self._clear()
        return snapshot


class DeviceTimer:
    """Times the device's work from construction to `end`."""

    def __init__(self, device: torch.device) -> None:
        self._events: tuple[torch.Event, torch.Event] | None = None
        if device.type != "cpu":  # such devices work while the host goes on
            self._events = (
                torch.Event(device, enable_timing=True),
                torch.Event(device, enable_timing=True),
            )
            self._events[0].record()
        self._began = self._ended = time.perf_counter()

    def end(self) -> DeviceTimer:
        """Stop the timer and return it."""
        if self._events is not None:
            self._events[1].record()
        self._ended = time.perf_counter()
        return self

    def seconds(self) -> float:
        """Return the measured time in seconds, once the device has finished the timed work."""
        if self._events is None:
            return self._ended - self._began
        begin, end = self._events
        return begin.elapsed_time(end) / 1000
