"""Layerwise updates for any LightningModule: gradients are freed as backward brings them."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import GradClipAlgorithmType, rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lit_ft.losses import ChunkedCrossEntropy
from lit_ft.optim.layerwise import LayerwiseStep, large_parameters
from lit_ft.subspace import subspace_layers


class LayerwiseUpdate(Callback):
    """Update each large parameter inside the backward pass, and free its gradient at once.

    Steps, schedules, checkpoints and logs stay what they are without it, and so do the weights, bit
    for bit. Hooks that look at gradients (`on_before_optimizer_step`) see only the small ones.

    Windows of several micro-batches keep their gradients, as they must, and step as usual. Clipping
    by norm needs a second backward pass. What GaLore has put into a subspace has small gradients
    and waits for the step.

    Args:
        min_grad_bytes: Gradients of this size and larger are not kept; 0 for all.
    """

    def __init__(self, min_grad_bytes: int = 2**20) -> None:
        self.min_grad_bytes = min_grad_bytes
        self._step: LayerwiseStep | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be right, before the model is loaded."""
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "LayerwiseUpdate follows automatic optimization: remove it from the callbacks, and "
                "use lit_ft.optim.layerwise.LayerwiseStep in your own loop."
            )
        if isinstance(trainer.strategy, DDPStrategy):
            raise MisconfigurationException(
                "Layerwise updates gain nothing under DDP, whose buckets keep every gradient, and "
                "ranks would drift apart: use update=whole (no LayerwiseUpdate), or strategy=fsdp."
            )
        if not isinstance(trainer.strategy, SingleDeviceStrategy):
            raise MisconfigurationException(
                f"Layerwise updates are for one device, not {type(trainer.strategy).__name__}: use "
                "update=whole (no LayerwiseUpdate)."
            )
        precision = trainer.precision_plugin
        if isinstance(precision, MixedPrecision) and precision.scaler is not None:
            raise MisconfigurationException(
                "float16's loss scaler judges all gradients before a step, and layerwise updates "
                "do not keep them: use trainer.precision=bf16-mixed, or update=whole."
            )
        if (
            trainer.gradient_clip_val
            and is_overridden("configure_gradient_clipping", pl_module, parent=LightningModule)
            and not getattr(pl_module, "clips_as_lightning_does", False)
        ):
            raise MisconfigurationException(
                f"{type(pl_module).__name__} clips in its own way, and layerwise updates leave it "
                "no gradients to clip: remove LayerwiseUpdate or trainer.gradient_clip_val."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow the optimizer."""
        if len(trainer.optimizers) != 1:
            raise MisconfigurationException(
                f"LayerwiseUpdate follows one optimizer; this module has {len(trainer.optimizers)}."
            )
        [optimizer] = trainer.optimizers
        moving = {layer.delta for layer in subspace_layers(pl_module).values()}
        large = [p for p in large_parameters(optimizer, self.min_grad_bytes) if p not in moving]
        threshold = trainer.gradient_clip_val or None
        by_value = trainer.gradient_clip_algorithm is GradClipAlgorithmType.VALUE
        self._step = LayerwiseStep(
            optimizer,
            large,
            max_norm=threshold if large and not by_value else None,
            max_value=threshold if by_value else None,
        )
        self._repeat_backward(pl_module, self._step.max_norm is not None)
        vars(pl_module).update(
            backward=self._step.backward, configure_gradient_clipping=self._clipping(pl_module)
        )
        self._tell(trainer, large)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the optimizer and the module."""
        self._detach(pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Let go of the optimizer and the module."""
        self._detach(pl_module)

    def _clipping(self, module: LightningModule) -> Any:
        usual, step = module.configure_gradient_clipping, self._step
        assert step is not None

        def configure_gradient_clipping(*args: Any, **kwargs: Any) -> None:
            if step.clips:
                if step.grad_norm is not None:
                    module.log("grad_norm", step.grad_norm)
            elif any(p.grad is not None for p in module.parameters()):
                usual(*args, **kwargs)

        return configure_gradient_clipping

    def _detach(self, module: LightningModule) -> None:
        if self._step is not None:
            self._step.remove()
            self._step = None
            self._repeat_backward(module, False)
            vars(module).pop("backward", None)
            vars(module).pop("configure_gradient_clipping", None)

    def _repeat_backward(self, module: LightningModule, allowed: bool) -> None:
        loss = getattr(module, "loss", None)
        if isinstance(loss, ChunkedCrossEntropy):
            loss.repeatable = allowed

    def _tell(self, trainer: Trainer, large: list[Tensor]) -> None:
        freed = sum(p.numel() * p.itemsize for p in large)
        told = (
            f"Layerwise updates: the gradients of {len(large)} parameters, {freed / 2**30:.2f} GiB"
        )
        if not large:
            told = "Layerwise updates: no gradient is large enough to be worth it"
        elif trainer.accumulate_grad_batches > 1:
            told += ", are kept while micro-batches accumulate: nothing is saved"
        else:
            told += ", are not kept"
            if trainer.gradient_clip_val and self._step is not None and self._step.max_norm:
                told += "; clipping by norm costs a second backward pass"
        rank_zero_info(told + ".")
