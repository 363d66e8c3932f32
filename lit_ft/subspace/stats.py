"""What is seen of subspaces while they train, without waiting for the device at each step."""

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

    The mean squared cosine of their principal angles, ||P_old P_newᵀ||² / r where the rows are
    orthonormal: 1 for the same span, about r / n for random ones.

    Args:
        old: P_old [r, n].
        new: P_new [r, n].
    """
    crossed = old @ new.T
    # Not `solve`: it waits for the device to say that it went well.
    in_old = torch.linalg.solve_ex(old @ old.T, crossed).result
    in_new = torch.linalg.solve_ex(new @ new.T, crossed.T).result
    share: Tensor = (in_old * in_new.T).sum() / len(old)
    return share


def squared_update(delta: Tensor, basis: Tensor) -> Tensor:
    """Return ||S P||², for S [rows, r] and P [r, n]; ||S||² where the rows are orthonormal."""
    return (delta @ (basis @ basis.T) * delta).sum()


@dataclass(frozen=True)
class Snapshot:
    """What was seen since the last snapshot, as plain numbers by layer.

    Attributes:
        energies: How much of the gradients' energy the basis captured at the last step, and all of
            it, see `energy.captured_and_total_energy`.
        overlaps: Of the last two bases, where a basis moved.
        seconds: That the last move took on this process, the moments' included.
        step_rms: Root mean square of what the last step added to the weights, decay left out, over
            the learning rate; None if nothing was stepped.
    """

    energies: dict[str, tuple[float, float]]
    overlaps: dict[str, float]
    seconds: dict[str, float]
    step_rms: float | None


class SubspaceStats:
    """Collects on the device what `snapshot` then returns.

    The last step before a snapshot shows its gradients' energies, which cost products of tokens
    with tokens, and the size of its update. Of each layer's moves the last one is measured.

    Args:
        layers: By name.
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
        """Let the next snapshot come after so many more optimizer steps (1 or more), or never."""
        self.steps_to_snapshot = steps
        for layer in self._layers.values():
            layer.energy.requires_grad_(steps == 1)

    def record_step(self, name: str, *, scale: float, lr: float) -> None:
        """Look at what a step has left in a layer, before it is folded; in a snapshot's step only.

        Args:
            name: The layer's.
            scale: α.
            lr: Of the step.
        """
        if self.steps_to_snapshot != 1:
            return
        layer = self._layers[name]
        # None: this rank's rows did not come through the layer.
        energy = layer.energy.grad
        self._energies[name] = torch.zeros_like(layer.energy) if energy is None else energy
        if lr:
            basis = layer.basis.detach()
            squared = squared_update(full_tensor(layer.delta).to(basis.device), basis)
            self._squared_steps.append(squared * (scale / lr) ** 2)
            self._num_weights += layer.weight.numel()

    def record_move(self, name: str, *, turned: Tensor, move: DeviceTimer) -> None:
        """Take note of a basis that has moved.

        Args:
            name: The layer's.
            turned: The overlap of its bases.
            move: The time that it took.
        """
        self._overlaps[name], self._moves[name] = turned, move

    def end_step(self) -> None:
        """Count down to the snapshot."""
        if self.steps_to_snapshot is not None:
            self.await_snapshot(self.steps_to_snapshot - 1 or None)

    def snapshot(self, all_reduce: Callable[[Sequence[Tensor]], None] | None) -> Snapshot:
        """Return what was seen since the last snapshot; waits for the device once.

        Args:
            all_reduce: Averages tensors over the ranks, in place: then every rank must call.
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
            # They ended before what was just waited for.
            seconds={name: move.seconds() for name, move in self._moves.items()},
            step_rms=(sum(numbers) / self._num_weights) ** 0.5 if self._num_weights else None,
        )
        self._clear()
        return snapshot


class DeviceTimer:
    """A stretch of the device's work, from the construction to `end`."""

    def __init__(self, device: torch.device) -> None:
        self._events: tuple[torch.Event, torch.Event] | None = None
        if device.type != "cpu":  # which works while the host goes on
            self._events = (
                torch.Event(device, enable_timing=True),
                torch.Event(device, enable_timing=True),
            )
            self._events[0].record()
        self._began = self._ended = time.perf_counter()

    def end(self) -> DeviceTimer:
        """End here."""
        if self._events is not None:
            self._events[1].record()
        self._ended = time.perf_counter()
        return self

    def seconds(self) -> float:
        """Return its length; the device must be past its end."""
        if self._events is None:
            return self._ended - self._began
        begin, end = self._events
        return begin.elapsed_time(end) / 1000
