"""Tell a memory tracker which phase a training is in, and what its tensors are for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lit_ft.measure.live_memory import (
    GRADIENTS,
    OPTIMIZER,
    SUBSPACE,
    WEIGHTS,
    MemoryTracker,
    Place,
)
from lit_ft.measure.memory import quantisation_tensors, state_tensors
from lit_ft.subspace import subspace_layers
from lit_ft.tensors.sharding import local


class Follower(Callback):
    """Tells a tracker which phase of a training it is in, and what tensors are for.

    Args:
        tracker: The tracker, which is told.

    Attributes:
        ahead: The place ahead of the model's first block; None if blocks are not told apart.
        behind: The place behind the model's last block; None if blocks are not told apart.
    """

    def __init__(self, tracker: MemoryTracker) -> None:
        self.tracker = tracker
        self.ahead: int | None = None
        self.behind: int | None = None
        self._hooks: list[Any] = []

    def mark_weights(self, module: LightningModule) -> None:
        """Mark the weights and subspaces of a module."""
        in_subspaces = {
            tensor
            for layer in subspace_layers(module).values()
            for tensor in (layer.delta, layer.basis)
        }
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            category = SUBSPACE if tensor in in_subspaces else WEIGHTS
            held = [local(tensor), *quantisation_tensors(getattr(tensor, "quant_state", None))]
            self.tracker.mark(held, category, block=self._block_of(name))

    def follow_gradients(self, module: LightningModule) -> None:
        """Mark each gradient as soon as it is there."""
        for name, parameter in module.named_parameters():
            self._follow_gradient(parameter, self._block_of(name))

    def release(self) -> None:
        """Look at gradients no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def mark_states(self, module: LightningModule, optimizers: Iterable[Optimizer]) -> None:
        """Mark the state of optimizers, of the parameters that have one already."""
        names: dict[Tensor, str] = {p: name for name, p in module.named_parameters()}
        for optimizer in optimizers:
            for parameter, state in optimizer.state.items():
                found = map(local, state_tensors(state))
                block = self._block_of(names.get(parameter, ""))
                self.tracker.mark(found, OPTIMIZER, block=block)

    def mark_gradients(self, module: LightningModule) -> None:
        """Mark the gradients that are there."""
        for name, parameter in module.named_parameters():
            self._mark_gradient(parameter, self._block_of(name))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Enter the forward pass."""
        self._enter("forward", trainer, self.ahead)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Enter the backward pass."""
        self._enter("backward", trainer, self.behind)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Enter the step."""
        self.mark_gradients(pl_module)
        self._enter("step", trainer, None)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave the step, whose state is there now."""
        self.mark_states(pl_module, trainer.optimizers)
        self._enter("between", trainer, None)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enter the validation."""
        self._enter("validation", trainer, self.ahead)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the validation."""
        self._enter("between", trainer, None)

    def _enter(self, phase: str, trainer: Trainer, block: int | None) -> None:
        self.tracker.place = Place(phase, trainer.global_step, block)

    def _follow_gradient(self, parameter: Tensor, block: int | None) -> None:
        if parameter.requires_grad:
            hook = parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                lambda held: self._mark_gradient(held, block)
            )
            self._hooks.append(hook)

    def _mark_gradient(self, parameter: Tensor, block: int | None) -> None:
        if parameter.grad is not None:
            self.tracker.mark([local(parameter.grad)], GRADIENTS, block=block)

    def _block_of(self, name: str) -> int | None:
        """Return the block that a tensor belongs to; None if it is none, or not told apart."""
        return None
