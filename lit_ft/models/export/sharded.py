"""Export a model that is sharded over ranks; no rank ever holds the whole model."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import split_state_dict_into_shards_factory
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.checkpoint.state_dict_saver import save


def export_sharded(model: Any, folder: Path, *, dtype: torch.dtype | None) -> None:
    """Write `model` in the format that `from_pretrained` loads; call this on every rank.

    Args:
        model: A transformers model that is sharded over the ranks.
        folder: The folder to write to, on a file system that all ranks see.
        dtype: The dtype of the written weights; None keeps the model's own.
    """
    if dist.get_rank() == 0:
        remove_weights(folder)
    dist.barrier()
    weights: dict[str, Any] = get_model_state_dict(model)
    left_out = names_left_out(model)
    weights = {
        name: tensor if dtype is None else tensor.to(dtype)
        for name, tensor in weights.items()
        if name not in left_out
    }
    files = split_state_dict_into_shards_factory(
        weights, get_storage_size=lambda tensor: tensor.nbytes, filename_pattern="{suffix}"
    )
    writer = HuggingFaceStorageWriter(
        str(folder),
        fqn_to_index_mapping={
            name: index
            for index, names in enumerate(files.filename_to_tensors.values(), start=1)
            for name in names
        },
        save_distributed=True,
        enable_consolidation=True,
    )
    save(weights, storage_writer=writer)
    if dist.get_rank() == 0:
        shutil.rmtree(folder / "sharded")
        save_config(model, folder, dtype=dtype or model.dtype)
    dist.barrier()


def remove_weights(folder: Path) -> None:
    """Remove an earlier export, which `from_pretrained` might load instead of the new one."""
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    remove_adapter(folder)


def remove_adapter(folder: Path) -> None:
    """Remove an earlier adapter, which `from_pretrained` would add to the model in `folder`."""
    for old in (folder / "adapter_config.json", *folder.glob("adapter_model*")):
        old.unlink(missing_ok=True)


def names_left_out(model: Any) -> set[str]:
    """Return the names of the weights that are not written to files, such as tied ones."""
    return {*(model._keys_to_ignore_on_save or ()), *model.all_tied_weights_keys}


def save_config(model: Any, folder: Path, *, dtype: torch.dtype) -> None:
    """Write the configuration that `from_pretrained` reads, for weights of dtype `dtype`."""
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    config.architectures = [type(model).__name__.removeprefix("FSDP")]  # fully_shard's prefix
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
