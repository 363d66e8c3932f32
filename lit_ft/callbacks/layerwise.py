"""Layerwise updates for any LightningModule: backward frees each gradient after its update."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import GradClipAlgorithmType, rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lit_ft.callbacks._support.second_backward import compiled_for_two_backward_passes
from lit_ft.callbacks._support.trainer import find_callback, loss_scaler, only_optimizer
from lit_ft.callbacks.galore import GaLore
from lit_ft.compat import remedies
from lit_ft.compat.not_finite import of_loss
from lit_ft.compat.protocols import is_usual_clipping
from lit_ft.compat.ranges import WholeNumber
from lit_ft.distributed.plan import Misconfiguration, check_run
from lit_ft.loss.chunked import ChunkedCrossEntropy
from lit_ft.optim.layerwise import LayerwiseStep, large_parameters
from lit_ft.subspace import SubspaceLayer, subspace_layers

log = logging.getLogger(__name__)

_BLOCK = re.compile(r".*\.\d+(?=\.)")  # the innermost module with a number in its name


class LayerwiseUpdate(Callback):
    """Update each large parameter inside the backward pass, and free its gradient at once.

    The weights are bit for bit the same as without this callback, and so are steps, schedules,
    checkpoints and metrics. Hooks that read gradients after backward (`on_after_backward`,
    `on_before_optimizer_step`) see only the small gradients. They cannot prevent a step, because
    the large parameters have already been updated.

    Not every step frees its gradients early. If gradients accumulate over several micro-batches,
    they must be kept, and the step is an ordinary one. The same holds under float16's loss scaler,
    which checks all gradients before a step; a message then says so. Clipping by norm needs a
    second backward pass. GaLore's layers do without: their gradients are small, and with clipping
    by norm, on several ranks and under a projector that needs whole gradients they wait for the
    step.

    A loss or a gradient that is not finite reaches no weight, and ends the fit with a
    FloatingPointError. Without clipping by norm, parameters that came earlier in the backward pass
    have then been updated.

    Args:
        min_grad_bytes: The size in bytes of the smallest gradient that is freed during backward; 0
            frees all gradients.

    Raises:
        Misconfiguration: If layerwise updates would be wrong. They work on one device, and under
            FSDP2 and tensor parallelism without clipping by norm. They do not work with manual
            optimization, with an optimizer that needs all gradients at once, or in a module that
            clips in its own way. Clipping by norm also fails in a module with its own `backward`,
            and with a GaLore projector that needs whole gradients.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> model = BoringModel()
        >>> layerwise = LayerwiseUpdate(min_grad_bytes=0)
        >>> trainer = L.Trainer(
        ...     callbacks=[layerwise], max_steps=2, accelerator="cpu", barebones=True
        ... )
        >>> trainer.fit(model)
        >>> [parameter.grad for parameter in model.parameters()]
        [None, None]
    """

    def __init__(self, min_grad_bytes: WholeNumber = 2**20) -> None:
        self.min_grad_bytes = min_grad_bytes
        self._step: LayerwiseStep | None = None
        self._undo = ExitStack()  # restores what one fit changes in the module and in torch

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse unsupported combinations before the model is loaded."""
        if stage == "fit":
            own = self.plan_facts(trainer, pl_module)
            check_run(trainer, pl_module, parts=["layerwise"], **own)

    def plan_facts(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """Return whether the module steps, clips or back-propagates in its own way."""
        clips = is_overridden("configure_gradient_clipping", module, LightningModule)
        usual = is_usual_clipping(module.configure_gradient_clipping)
        return {
            "layerwise": True,
            "optimizes_by_hand": not module.automatic_optimization,
            "clips_its_own_way": clips and not usual,
            "back_propagates_its_own_way": is_overridden("backward", module, LightningModule),
        }

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to the optimizer, and replace the module's clipping and, if needed, backward."""
        optimizer = only_optimizer(trainer, self)
        named = subspace_layers(pl_module)
        layers = named.values()
        large = large_parameters(optimizer, self.min_grad_bytes)
        of_layers = {layer.delta for layer in layers}
        deltas = [p for p in large if p in of_layers]
        in_subspaces = of_layers | {layer.weight for layer in layers}
        large = [p for p in large if p not in in_subspaces]
        if loss_scaler(trainer) is not None:
            rank_zero_info(
                "float16's loss scaler checks all gradients before a step, so updates are not "
                "layerwise. bf16-mixed needs no scaler."
            )
            return
        galore = find_callback(trainer, GaLore)
        updater = None if galore is None or trainer.world_size > 1 else galore.updater
        groups: list[list[Tensor]] = []
        limits = _clipping(trainer)
        if updater is not None:
            updater.step_in_parts(deltas)
            # Clipping by norm and projectors of that kind need all gradients before the first step.
            if limits[0] is None and not updater.tracker.projector.forms_gradients:
                large += deltas
                groups = _by_block(named, deltas)
        max_norm, max_value = limits if large else (None, None)
        if max_norm is not None:
            self._prepare_second_backward(trainer, pl_module)
        self._step = LayerwiseStep(
            optimizer,
            large,
            max_norm=max_norm,
            max_value=max_value,
            in_parts=() if updater is None else deltas,
            companions={layer.delta: (layer.basis, layer.energy) for layer in layers},
            around=None if updater is None else updater.stepping,
            groups=groups,
        )
        self._step.steps = trainer.global_step
        if max_norm is not None:
            self._replace(pl_module, "backward", self._step.backward)
        self._replace(pl_module, "configure_gradient_clipping", self._own_clipping(pl_module))
        _tell(trainer, large, max_norm)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Raise NotFinite if the loss is not finite, before it can reach a weight."""
        if self._step is None:
            return
        # All ranks must stop together, or the others would wait in backward.
        if not trainer.strategy.reduce_boolean_decision(bool(loss.isfinite())):
            raise of_loss(trainer.global_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Detach from the optimizer, and restore the module and torch."""
        self._detach()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Detach from the optimizer, and restore the module and torch."""
        self._detach()

    def _prepare_second_backward(self, trainer: Trainer, module: LightningModule) -> None:
        galore = find_callback(trainer, GaLore)
        if galore and galore.projector.forms_gradients:
            raise Misconfiguration(
                f"{galore.projector} rewrites gradients after backward, where layerwise updates "
                "have clipped them",
                remedies.WHOLE_UPDATE,
                remedies.NO_CLIPPING,
            )
        self._undo.enter_context(compiled_for_two_backward_passes())
        loss = getattr(module, "loss", None)
        if isinstance(loss, ChunkedCrossEntropy):
            self._undo.callback(setattr, loss, "repeatable", loss.repeatable)
            loss.repeatable = True

    def _replace(self, module: LightningModule, name: str, own: Callable[..., Any]) -> None:
        """Replace the module's method `name` with `own` until the fit ends."""
        before = vars(module).get(name)  # a user may have set one on the instance

        def put_back() -> None:
            if vars(module).get(name) is not own:
                return  # something else has replaced it since
            if before is None:
                del vars(module)[name]
            else:
                vars(module)[name] = before

        vars(module)[name] = own
        self._undo.callback(put_back)

    def _own_clipping(self, module: LightningModule) -> Any:
        usual, step = module.configure_gradient_clipping, self._step
        assert step is not None
        logs_norm = is_usual_clipping(usual)

        def configure_gradient_clipping(*args: Any, **kwargs: Any) -> None:
            if step.clips_now:
                if logs_norm and step.grad_norm is not None:
                    module.log("grad_norm", step.grad_norm)
            elif any(p.grad is not None for p in module.parameters()):
                usual(*args, **kwargs)

        return configure_gradient_clipping

    def _detach(self) -> None:
        if self._step is not None:
            self._step.remove()
            self._step = None
        self._undo.close()


def _clipping(trainer: Trainer) -> tuple[float | None, float | None]:
    """Return the trainer's limits for the norm and the values of gradients; None for no limit."""
    threshold = trainer.gradient_clip_val or None
    by_value = trainer.gradient_clip_algorithm is GradClipAlgorithmType.VALUE
    return (None, threshold) if by_value else (threshold, None)


def _by_block(layers: Mapping[str, SubspaceLayer], deltas: Iterable[Tensor]) -> list[list[Tensor]]:
    """Return those of `deltas` that belong to a block of the model, in a list for each block."""
    wanted, groups = set(deltas), defaultdict[str, list[Tensor]](list)
    for name, layer in layers.items():
        block = _BLOCK.match(name)
        if block is not None and layer.delta in wanted:
            groups[block[0]].append(layer.delta)
            wanted.discard(layer.delta)  # a layer that blocks share belongs to the first of them
    return list(groups.values())


def _tell(trainer: Trainer, large: list[Tensor], max_norm: float | None) -> None:
    freed = sum(p.numel() * p.itemsize for p in large) / 2**30
    told = f"Layerwise updates: {freed:.2f} GiB of gradients are "
    if not large:
        # Logged, not printed: this is the usual case with GaLore and adapters.
        log.info("Layerwise updates: every gradient is small and waits for the step.")
        return
    if trainer.accumulate_grad_batches > 1:
        told += "kept while micro-batches accumulate: nothing is saved"
    else:
        told += "not kept"
        if max_norm is not None:
            told += (
                ". Clipping by norm needs a second backward pass: updates after backward, or no "
                "clipping, do without"
            )
    rank_zero_info(told + ".")
