"""Export a model that is spread over ranks: each writes its part, none holds all of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.checkpoint.state_dict_saver import save

_FILE_BYTES = 5 * 10**9  # as transformers cuts


def export_sharded(model: Any, folder: Path, *, dtype: torch.dtype | None) -> None:
    """Write `model` as `from_pretrained` loads it; call it on every rank.

    Args:
        model: A transformers model under `fully_shard`.
        folder: On a file system that all ranks see.
        dtype: Of the written weights; None keeps the model's.
    """
    if dist.get_rank() == 0:
        # from_pretrained would prefer a file of the other kind that an earlier export has left.
        for old in folder.glob("model*.safetensors*"):
            old.unlink()
    dist.barrier()
    weights: dict[str, Any] = get_model_state_dict(model)
    left_out = {*(model._keys_to_ignore_on_save or ()), *model.all_tied_weights_keys}
    weights = {
        name: tensor if dtype is None else tensor.to(dtype)
        for name, tensor in weights.items()
        if name not in left_out
    }
    writer = HuggingFaceStorageWriter(
        str(folder),
        fqn_to_index_mapping=_files(weights),
        save_distributed=True,
        enable_consolidation=True,
    )
    save(weights, storage_writer=writer)
    if dist.get_rank() == 0:
        shutil.rmtree(folder / "sharded")
        config = type(model.config).from_dict(model.config.to_dict())
        config.dtype = dtype or model.dtype
        config.architectures = [type(model).__name__.removeprefix("FSDP")]  # fully_shard's prefix
        config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
    dist.barrier()


def _files(weights: dict[str, Tensor]) -> dict[str, int]:
    """Return which file each tensor goes into, the first being 1."""
    files, taken = {}, 0
    for name, tensor in weights.items():
        taken += tensor.numel() * tensor.itemsize
        files[name] = 1 + taken // _FILE_BYTES
    return {name: 1 + sorted(set(files.values())).index(file) for name, file in files.items()}
