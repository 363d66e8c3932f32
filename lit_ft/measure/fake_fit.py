"""Train for a few steps on fake tensors, and record the memory that training would take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from lit_ft.measure.fake_quantised import quantise, replace_layers
from lit_ft.measure.fake_tensors import fake_tensors, without_fakes
from lit_ft.measure.follower import Follower
from lit_ft.measure.live_memory import MemoryTracker, Place
from lit_ft.optim.model_blocks import declared_blocks

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

    def to(*_: Any, dtype: torch.dtype | None = None, **__: Any) -> LightningModule:
        return module if dtype is None else type(module).to(module, dtype=dtype)

    vars(module).update(to=to, cpu=lambda: module)  # it is where it belongs
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
        # Once more at the end, where callbacks have put back what they had changed for training.
        trainer.validate(module, _Repeated(val_batch), verbose=False)
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
            if (quantisation := getattr(self.source, "quantization_config", None)) is not None:
                replace_layers(model, quantisation)
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(dtype)
        if shard is not None:
            shard(model)
        given: dict[Tensor, Tensor] = {}  # tied weights stay tied
        for module in model.modules():
            if isinstance(module, Linear4bit):
                quantise(module)
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


class _Follower(Follower):
    """Follows each block of the model too."""

    def __init__(self, tracker: MemoryTracker) -> None:
        super().__init__(tracker)
        self.blocks = 0
        self._block: dict[str, int] = {}  # of each module, keyed by name

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.tracker.place = Place("load")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model: Any = pl_module.model
        blocks = list(declared_blocks(model).items())
        self.blocks = len(blocks)
        self.ahead, self.behind = -1, self.blocks
        for number, (name, block) in enumerate(blocks):
            self._block[f"model.{name}."] = number
            self._follow_block(block, number)
        self.mark_weights(pl_module)
        self.follow_gradients(pl_module)

    def _move_to(self, block: int) -> None:
        place = self.tracker.place
        self.tracker.place = Place(place.phase, place.step, block)

    def _follow_block(self, block: nn.Module, number: int) -> None:
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

    def _block_of(self, name: str) -> int | None:
        return next((n for prefix, n in self._block.items() if name.startswith(prefix)), None)
