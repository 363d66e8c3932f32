"""What does not go together with the GaLore callback: refused before anything is injected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from peft import PeftConfig
from torch.distributed.device_mesh import DeviceMesh

from lit_ft.callbacks._support.trainer import callbacks_of
from lit_ft.distributed import TensorParallelStrategy
from lit_ft.subspace import SubspaceLayer, targeted
from lit_ft.subspace.layers.base import Sides
from lit_ft.subspace.projectors import Projector
from lit_ft.tensors.sharding import is_sharded


def refuse_other_callbacks(trainer: Trainer, galore: Callback) -> None:
    """Raise MisconfigurationException for callbacks that would train or copy without `galore`."""
    callbacks = callbacks_of(trainer)
    if any(isinstance(callback, LearningRateFinder) for callback in callbacks):
        raise MisconfigurationException(
            "Lightning's learning rate finder trains without callbacks, and without GaLore its "
            "parameters move no weight: find the rate without GaLore. It means the same."
        )
    for callback in takewhile(lambda callback: callback is not galore, callbacks):
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            name = type(callback).__name__
            raise MisconfigurationException(
                f"{name} copies the module as it is before GaLore: list GaLore before {name}."
            )


def refuse_module_or_strategy(
    trainer: Trainer, module: LightningModule, projector: Projector
) -> None:
    """Raise MisconfigurationException for adapters, and for weights shared in another way."""
    if isinstance(getattr(module, "adapter", None), PeftConfig):
        raise MisconfigurationException(
            "An adapter's few weights need no subspace: use adapter=none with GaLore, or "
            "optim=adamw with the adapter."
        )
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        _refuse_sharding(trainer, module, projector)
    elif not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        raise MisconfigurationException(
            f"GaLore is for one device, DDP or FSDP2, not {type(strategy).__name__}."
        )


def refuse_other_layers(
    model: torch.nn.Module,
    found: Mapping[str, SubspaceLayer],
    *,
    rank: int,
    side: Sides,
    targets: str | Sequence[str],
) -> None:
    """Raise MisconfigurationException where layers are in subspaces that were not asked for.

    Args:
        model: As the module has made it.
        found: Its layers that are in subspaces already.
        rank: That was asked for.
        side: As well.
        targets: As well.
    """
    if not found and any(is_sharded(weight) for weight in model.parameters()):
        raise MisconfigurationException(
            "The model was sharded before GaLore's layers were in it: shard in a method "
            "shard_model, which configure_model calls, or call lit_ft.subspace.inject(model, "
            f"rank={rank}) in configure_model before fully_shard."
        )
    for name, layer in found.items():
        if layer.rank != min(rank, *layer.weight.shape):
            raise MisconfigurationException(
                f"{name} was injected with rank {layer.rank}, GaLore has rank={rank}: give both "
                "the same."
            )
        if layer.side != layer.side_of(side, rank):
            raise MisconfigurationException(
                f"{name} was injected with side={layer.side}, GaLore has side={side}: give both "
                "the same."
            )
    if found:
        injected = {n for n, m in model.named_modules() if isinstance(m, SubspaceLayer)}
        if differing := sorted(injected ^ targeted(model, targets).keys()):
            raise MisconfigurationException(
                f"inject() and GaLore have other targets, such as {differing[0]}: give both the "
                "same."
            )


def _refuse_sharding(trainer: Trainer, module: LightningModule, projector: Projector) -> None:
    """Refuse what does not work where each rank holds a part of the weights."""
    mesh = module.device_mesh
    cuts_layers = isinstance(mesh, DeviceMesh) and mesh["tensor_parallel"].size() > 1
    if cuts_layers or isinstance(trainer.strategy, TensorParallelStrategy):
        raise MisconfigurationException(
            "GaLore works with sharded data parallelism, not with tensor parallelism: use "
            "strategy=fsdp, that is FSDP2Strategy(), or optim=adamw, that is no GaLore."
        )
    if trainer.precision == "bf16-true":
        raise MisconfigurationException(
            "FSDP2 wants one type of numbers in a block, and beside bfloat16 weights GaLore's "
            "small parameters are float32: use trainer.precision=bf16-mixed."
        )
    if projector.forms_gradients:
        raise MisconfigurationException(
            f"{type(projector).__name__} takes bases from whole gradients, and where weights are "
            "sharded no rank has one: use optim=galore, optim=galore_subspace, or strategy=ddp."
        )
