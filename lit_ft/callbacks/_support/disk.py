"""What a training will write to the disk, and how much room there is."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lit_ft.callbacks._support.trainer import network_of, total_steps
from lit_ft.measure import estimate_state_bytes
from lit_ft.measure.model_size import model_size
from lit_ft.tensors.sharding import is_model_sharded


@dataclass(frozen=True)
class StateBytes:
    """The bytes of what is saved, over all ranks.

    Attributes:
        weights: The bytes of the weights in a checkpoint. Under an adapter, the frozen ones are
            left out. The bases of subspaces count.
        optimizer: The bytes of the optimizer state; an estimate.
        export: The bytes of the exported model.
    """

    weights: int
    optimizer: int
    export: int


def state_bytes(trainer: Trainer, module: LightningModule) -> StateBytes:
    """Return the bytes of what this training can save."""
    model = network_of(module)
    adapter = hasattr(model, "peft_config")
    saved = [p for p in model.parameters() if p.requires_grad or not adapter]
    groups = [group for one in trainer.optimizers for group in estimate_state_bytes(one)]
    ranks = trainer.world_size if is_model_sharded(model) else 1
    return StateBytes(
        weights=sum(map(_num_bytes, [*saved, *model.buffers()])),
        optimizer=ranks * sum(group or 0 for group in groups),
        export=ranks * model_size(model).weight_bytes,
    )


def num_states(trainer: Trainer, every_n_steps: int, keep: int) -> int:
    """Return the largest number of states that are on the disk at the same time.

    Args:
        trainer: The trainer, which knows how many steps it takes.
        every_n_steps: The number of steps between two saves.
        keep: The number of states to keep. A new one is written before the oldest is removed.
    """
    steps = total_steps(trainer)
    saves = math.ceil(steps / every_n_steps) if math.isfinite(steps) else keep
    return max(1, min(saves, max(keep, 2)))


def free_bytes(folder: str | Path) -> int:
    """Return the bytes that are free where a folder is, or where it will be made."""
    folder = Path(folder).absolute()
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    return shutil.disk_usage(existing).free


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()  # of a sharded tensor: over all ranks
