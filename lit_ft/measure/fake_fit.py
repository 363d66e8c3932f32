"""Train for a few steps on fake tensors, and record the memory that training would take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import _disable_current_modes

from lit_ft.measure.fake_tensors import fake_tensors, without_fakes
from lit_ft.measure.live_memory import (
    GRADIENTS,
    OPTIMIZER,
    SUBSPACE,
    WEIGHTS,
    MemoryTracker,
    Place,
)
from lit_ft.measure.memory import state_tensors
from lit_ft.subspace import subspace_layers
from lit_ft.tensors.sharding import local

STEPS = 2  # the first makes the optimizer's state, and the second has it from its start


def fake_fit(
    module: LightningModule,
    trainer: Trainer,
    batch: Mapping[str, Any],
    val_batch: Mapping[str, Any],
    tracker: MemoryTracker,
    *,
    device_type: str = "cpu",
) -> int:
    """Fit `module` on fake tensors, and return the number of the model's blocks.

    Args:
        module: The module, with a `source` that builds its model on the meta device.
        trainer: The trainer, which must take `STEPS` optimizer steps and then validate.
        batch: The micro-batch of every training step.
        val_batch: The batch of the validation.
        tracker: The tracker that records what happens.
        device_type: The device to train on: "cpu" or "cuda". The trainer's own is the CPU.
    """
    vars(module)["source"] = FakeSource(module.source)
    vars(module).update(to=lambda *_, **__: module, cpu=lambda: module)  # it is where it belongs
    vars(module).update(log=lambda *_, **__: None, log_dict=lambda *_, **__: None)
    # The other ranks do not answer.
    vars(trainer.strategy).update(reduce_boolean_decision=lambda decision, **_: decision)
    for name in ("setup_environment", "_fsdp_mesh"):
        if hasattr(trainer.strategy, name):
            vars(trainer.strategy)[name] = without_fakes(getattr(trainer.strategy, name))
    follower = _Follower(tracker)
    trainer.callbacks.insert(0, follower)  # type: ignore[attr-defined]
    with fake_tensors(tracker, device_type=device_type):
        trainer.fit(module, _Repeated(batch), _Repeated(val_batch))
    return follower.blocks


class FakeSource:
    """A model source whose models have no values; otherwise it is like another source."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def load_model(self, dtype: torch.dtype, *, shard: Any = None) -> Any:
        """Return the model with fake weights; see `ModelSource`."""
        with _disable_current_modes():
            model = self.source.build_empty()
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(dtype)
        if shard is not None:
            shard(model)
        given: dict[Tensor, Tensor] = {}  # tied weights stay tied
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        if tensor not in given:
                            given[tensor] = _with_memory(tensor)
                        held[name] = given[tensor]
        return model


def _with_memory(tensor: Tensor) -> Tensor:
    """Return a tensor like one on the meta device, or the tensor itself if it is elsewhere."""
    if tensor.device.type != "meta":
        return tensor
    empty = torch.empty_like(tensor, device="cpu")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty


class _Repeated:
    """A loader that gives out one batch for ever."""

    def __init__(self, batch: Mapping[str, Any]) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        while True:
            yield dict(self.batch)


class _Follower(Callback):
    """Tells a tracker which part of the run it is in, and what tensors are for."""

    def __init__(self, tracker: MemoryTracker) -> None:
        self.tracker = tracker
        self.blocks = 0
        self._block: dict[str, int] = {}  # of each module, keyed by name

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.tracker.place = Place("load")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model: Any = pl_module.model
        names = set(getattr(model, "_no_split_modules", None) or ())
        blocks = [
            (name, part)
            for name, part in model.named_modules()
            # `fully_shard` puts a class of its own in front.
            if names & {kind.__name__ for kind in type(part).__mro__}
        ]
        self.blocks = len(blocks)
        for number, (name, block) in enumerate(blocks):
            self._block[f"model.{name}."] = number
            self._follow(block, number)
        in_subspaces = {
            tensor
            for layer in subspace_layers(model).values()
            for tensor in (layer.delta, layer.basis)
        }
        tensors = [*pl_module.named_parameters(), *pl_module.named_buffers()]
        for name, tensor in tensors:
            category = SUBSPACE if tensor in in_subspaces else WEIGHTS
            self.tracker.mark([local(tensor)], category, block=self._block_of(name))
        for name, parameter in pl_module.named_parameters():
            self._follow_gradient(parameter, self._block_of(name))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._enter("forward", trainer, -1)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        self._enter("backward", trainer, self.blocks)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        for name, parameter in pl_module.named_parameters():
            if parameter.grad is not None:
                self.tracker.mark([local(parameter.grad)], GRADIENTS, block=self._block_of(name))
        self._enter("step", trainer, None)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        names: dict[Tensor, str] = {p: name for name, p in pl_module.named_parameters()}
        for optimizer in trainer.optimizers:
            for parameter, state in optimizer.state.items():
                found = map(local, state_tensors(state))
                block = self._block_of(names[parameter])
                self.tracker.mark(found, OPTIMIZER, block=block)
        self._enter("between", trainer, None)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter("validation", trainer, -1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter("between", trainer, None)

    def _enter(self, phase: str, trainer: Trainer, block: int | None) -> None:
        self.tracker.place = Place(phase, trainer.global_step, block)

    def _move_to(self, block: int) -> None:
        place = self.tracker.place
        self.tracker.place = Place(place.phase, place.step, block)

    def _follow(self, block: nn.Module, number: int) -> None:
        last = self.blocks - 1

        def before(_: Any, args: Any, kwargs: Any) -> None:
            self._move_to(number)
            if number == 0:
                for tensor in (*args[:1], *list(kwargs.values())[:1]):
                    self._follow_backward(tensor, -1)

        def after(_: Any, args: Any, output: Any) -> None:
            self._follow_backward(output[0] if isinstance(output, tuple) else output, number)
            if number == last and self.tracker.place.phase != "backward":
                self._move_to(self.blocks)

        block.register_forward_pre_hook(before, with_kwargs=True)
        block.register_forward_hook(after)

    def _follow_backward(self, tensor: Any, block: int) -> None:
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            tensor.register_hook(lambda _: self._move_to(block))  # type: ignore[no-untyped-call]

    def _follow_gradient(self, parameter: Tensor, block: int | None) -> None:
        def mark(held: Tensor) -> None:
            if held.grad is not None:
                self.tracker.mark([local(held.grad)], GRADIENTS, block=block)

        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(mark)  # type: ignore[no-untyped-call]

    def _block_of(self, name: str) -> int | None:
        return next((n for prefix, n in self._block.items() if name.startswith(prefix)), None)
