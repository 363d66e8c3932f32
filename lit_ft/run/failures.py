"""Errors that a run ends with, and the settings that mend them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy

from lit_ft.callbacks import GaLore, LayerwiseUpdate
from lit_ft.callbacks._support.trainer import find_callback
from lit_ft.datamodule import InstructionDataModule
from lit_ft.distributed import TensorParallelStrategy
from lit_ft.module import CausalLMModule
from lit_ft.run.summary import status_of


@contextmanager
def remedies_for_out_of_memory(
    module: CausalLMModule, datamodule: InstructionDataModule, trainer: Trainer
) -> Iterator[None]:
    """Let an error of too little memory name the settings that need less, and go with the run's.

    Raises:
        torch.OutOfMemoryError: In place of what the device's allocator raises.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if status_of(error) != "out_of_memory":
            raise
        settings = ", ".join(_settings_that_need_less(module, datamodule, trainer))
        raise torch.OutOfMemoryError(
            f"{error}\nSettings that need less memory: {settings}."
        ) from error


def _settings_that_need_less(
    module: CausalLMModule, datamodule: InstructionDataModule, trainer: Trainer
) -> list[str]:
    galore = find_callback(trainer, GaLore)
    in_8_bits = "8bit" in optimizer_name(module)
    whole = module.adapter is None
    quantised = getattr(module.source, "quantization_config", None) is not None
    sharded = isinstance(trainer.strategy, ModelParallelStrategy)
    by_columns = isinstance(trainer.strategy, TensorParallelStrategy)
    single = isinstance(trainer.strategy, SingleDeviceStrategy)
    # What LayerwiseUpdate follows, and where it is of use.
    layerwise = whole and not galore and (single or (sharded and not trainer.gradient_clip_val))
    smaller_optimizer = "optim=galore_subspace_8bit"
    if sharded:
        smaller_optimizer = "optim=adamw_8bit_torchao galore=online"
    remedies = {
        f"data.batch_size={datamodule.batch_size // 2} with twice the "
        "trainer.accumulate_grad_batches": datamodule.batch_size > 1,
        "module.activation_checkpointing=true": not module.activation_checkpointing,
        f"data.max_length below {datamodule.max_length}": True,
        "update=layerwise": layerwise and not find_callback(trainer, LayerwiseUpdate),
        smaller_optimizer: whole and not by_columns and not (galore and in_8_bits),
        f"galore.rank below {galore.rank if galore else 0}": galore is not None,
        "adapter=lora": whole and not by_columns,
        "adapter=qlora": not whole and not sharded and not quantised,
    }
    return [setting for setting, applies in remedies.items() if applies]


@contextmanager
def remedies_for_another_run(resume: str | Path | None) -> Iterator[None]:
    """Let what torch says of a checkpoint that does not fit say of which run it is.

    Raises:
        MisconfigurationException: Names what differs.
    """
    try:
        yield
    except RuntimeError as error:
        told = ("in loading state_dict for", "is of another model or adapter")
        if resume is None or not any(part in str(error) for part in told):
            raise
        what = "is of another model or adapter"
        if ".basis" in str(error):
            what = "has subspaces of layers that this run trains whole"
            if "Missing key" in str(error):
                what = "has no subspaces of layers that this run trains in one"
            what += " (another optim, or other galore.targets)"
        raise not_this_run(f"resume={resume} {what}") from error


@contextmanager
def errors_of_starting_loaders() -> Iterator[None]:
    """Raise the error of a loader that does not start, not the one of tidying up behind it."""
    try:
        yield
    except RuntimeError as error:  # of Lightning's tidying up behind a loader that did not start
        first = error.__context__
        if first is None or "iter(combined_loader)" not in str(error):
            raise
        raise first from None


def not_this_run(what: str) -> MisconfigurationException:
    """Return the error for a checkpoint of another run; `what` says how one knows."""
    return MisconfigurationException(
        f"{what}: repeat its run's own arguments (.hydra/overrides.yaml in its folder lists them), "
        "or start afresh from the weights that it exported: model=pretrained "
        "model.name_or_path=RUN_DIR/export"
    )


def optimizer_name(module: CausalLMModule) -> str:
    """Return the class's name, which stands for the layout of an optimizer's state."""
    name = getattr(getattr(module.optimizer, "func", module.optimizer), "__name__", "")
    return str(name).removeprefix("Paged")  # the same state, elsewhere
