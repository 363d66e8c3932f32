"""GaLore for any LightningModule: its optimizer trains whole weights in subspaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lit_ft.subspace import MATCH_ADAMW, SubspaceStep, inject
from lit_ft.subspace.layer import Side
from lit_ft.subspace.projectors import Oja, Projector


class GaLore(Callback):
    """Turn the module's optimizer into its GaLore version: full-parameter training in subspaces.

    The matrices of the targeted layers are frozen for autograd and move through small parameters,
    which take their place in the optimizer that the module builds. After each step the small
    parameters are folded into the weights. The learning rate means what it means without GaLore.

    Args:
        rank: Of the subspaces: a quarter of the hidden size and less.
        projector: How the bases move; None for `Oja()`, online subspace descent.
        targets: Which layers, see `lit_ft.subspace.inject`.
        side: What a basis spans, a layer's inputs ("right") or outputs ("left").
        scale: α, a number (the paper's 0.25) or "match_adamw", √(cols / rank).
        seed: Of the bases that training starts from, and of stochastic rounding.
    """

    def __init__(
        self,
        rank: int = 128,
        projector: Projector | None = None,
        *,
        targets: str | Sequence[str] = "all",
        side: Side = "right",
        scale: float | str = MATCH_ADAMW,
        seed: int = 0,
    ) -> None:
        self.rank = rank
        self.projector = projector or Oja()
        self.targets = targets
        self.side = side
        self.scale = scale
        self.seed = seed
        self.steps: SubspaceStep | None = None
        self._handle: RemovableHandle | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Inject once the model is there: now, or behind the module's `configure_model`."""
        if self.steps is not None:
            return
        if not is_overridden("configure_model", pl_module, parent=LightningModule):
            self._inject(pl_module)
            return
        configure_model = pl_module.configure_model

        def configure_model_and_inject() -> None:
            configure_model()
            if self.steps is None:
                self._inject(pl_module)

        pl_module.configure_model = configure_model_and_inject  # type: ignore[method-assign]

    def _inject(self, module: LightningModule) -> None:
        target = getattr(module, "model", None)
        model = target if isinstance(target, torch.nn.Module) else module
        layers = inject(model, rank=self.rank, targets=self.targets, side=self.side, seed=self.seed)
        self.steps = SubspaceStep(
            layers, self.projector, scale=self.scale, seed=self.seed, all_reduce=_average
        )
        small = sum(layer.delta.numel() for layer in layers.values())
        whole = sum(layer.weight.numel() for layer in layers.values())
        rank_zero_info(
            f"GaLore: {whole:,} weights of {len(layers)} layers move through {small:,} parameters "
            f"({small / whole:.1%}), rank {self.rank}, {self.projector}."
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow the optimizer."""
        if len(trainer.optimizers) != 1:
            raise MisconfigurationException(
                f"GaLore follows one optimizer; this module builds {len(trainer.optimizers)}."
            )
        assert self.steps is not None
        self._handle = self.steps.attach(trainer.optimizers[0])

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Take the bases that come from the gradients of this step."""
        assert self.steps is not None
        self.steps.before_step(optimizer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the optimizer."""
        self._detach()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Let go of the optimizer."""
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs beside the model's own tensors."""
        made_with = {"rank": self.rank, "side": self.side, "projector": repr(self.projector)}
        steps = None if self.steps is None else self.steps.state_dict()
        return {"made_with": made_with, "steps": steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint.

        Raises:
            MisconfigurationException: It was made with another rank, side or projector.
        """
        for name, saved in state_dict["made_with"].items():
            current = getattr(self, name)
            if (current if isinstance(current, int | str) else repr(current)) != saved:
                raise MisconfigurationException(
                    f"The checkpoint was made with {name}={saved}, this run has {name}={current}: "
                    "its bases and moments do not fit. Set the same, or start from its exported "
                    "weights."
                )
        if self.steps is not None and state_dict["steps"] is not None:
            self.steps.load_state_dict(state_dict["steps"])

    def _detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if self.steps is not None:
            self.steps.stop()


def _average(tensor: Tensor) -> None:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
