"""Track the memory of stretches of a real training, such as one step."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lit_ft.measure.follower import Follower
from lit_ft.measure.kernel_temporaries import tracker_on
from lit_ft.measure.live_memory import Event, MemoryTracker
from lit_ft.measure.memory import take_peak
from lit_ft.measure.opened_operations import OpenedOperations


class StretchTracker:
    """Tracks the memory of stretches of a training, each from `begin` to `end`.

    Each operation goes through Python meanwhile, which takes time and changes no result.

    Args:
        module: The module that is trained. Its gradients are looked at from now on, ahead of hooks
            that free them.
        device: The device that it is trained on, whose memory counts.

    Attributes:
        follower: The callback whose hooks tell the phases. Whoever tracks calls them.
    """

    def __init__(self, module: LightningModule, device: torch.device) -> None:
        self.device = device
        self.follower = _Follower(self._new_tracker(), device)
        self.follower.follow_gradients(module)
        self._modes = ExitStack()

    @property
    def is_on(self) -> bool:
        """Whether a stretch is tracked now."""
        return self.follower.is_on

    @property
    def allocator(self) -> dict[str, int]:
        """The allocator's own peak bytes in each phase of the last stretch; empty without CUDA."""
        return self.follower.allocator

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        """Begin to track, with what is in memory already."""
        tracker = self._new_tracker()
        self.follower.begin(tracker)
        self._modes.enter_context(tracker)
        self._modes.enter_context(OpenedOperations(self.device.type))
        self.follower.mark_weights(module)
        self.follower.mark_gradients(module)
        self.follower.mark_states(module, trainer.optimizers)

    def end(self) -> list[Event]:
        """Stop, and return the allocations and releases in their order."""
        self._modes.close()
        self.follower.is_on = False
        events = self.follower.tracker.events
        self.follower.tracker.events = []  # for releases that come later
        return events

    def close(self) -> None:
        """Stop, and look at gradients no more."""
        self.end()
        self.follower.release()

    def _new_tracker(self) -> MemoryTracker:
        return tracker_on(self.device.type, alone=True)


class _Follower(Follower):
    """Takes the allocator's peak at the end of each phase, and rests outside of stretches."""

    def __init__(self, tracker: MemoryTracker, device: torch.device) -> None:
        super().__init__(tracker)
        self.device = device
        self.is_on = False
        self.allocator: dict[str, int] = {}

    def begin(self, tracker: MemoryTracker) -> None:
        self.tracker, self.is_on, self.allocator = tracker, True, {}

    def _enter(self, phase: str, trainer: Trainer, block: int | None) -> None:
        ended, peak = self.tracker.place.phase, take_peak(self.device)
        if peak is not None:
            self.allocator[ended] = max(peak, self.allocator.get(ended, 0))
        super()._enter(phase, trainer, block)

    def _mark_gradient(self, parameter: Tensor, block: int | None) -> None:
        if self.is_on:
            super()._mark_gradient(parameter, block)
