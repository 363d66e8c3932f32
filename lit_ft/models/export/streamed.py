"""Export weights without loading a model; at most one file's weights are in memory at a time."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch import Tensor

from lit_ft.models.export.sharded import names_left_out, remove_weights, save_config
from lit_ft.storage.write_errors import write_errors_name


def export_streamed(
    model: Any,
    weights: Mapping[str, Tensor],
    read: Callable[[dict[str, Tensor]], None],
    folder: Path,
    *,
    dtype: torch.dtype | None,
    max_shard_size: str = "5GB",
) -> None:
    """Write weights in the format that `from_pretrained` loads.

    Args:
        model: A transformers model on the meta device. It gives the configuration, and the names
            that the weights must have.
        weights: A tensor on the meta device for each weight, with the weight's shape and dtype,
            keyed by its name in the model.
        read: The function that reads weights. It receives empty tensors keyed by name, and fills
            them with the weights' values, converted to the tensors' dtype.
        folder: The folder to write to, which must exist.
        dtype: The dtype of the written floating-point weights; None keeps each weight's own.
        max_shard_size: The largest size of one file, such as "5GB", and so of the weights in memory
            at a time. A single weight that is larger gets a file of its own.

    Raises:
        ValueError: If the names in `weights` are not those of the model's weights.
    """
    left_out = names_left_out(model)
    expected = model.state_dict().keys() - left_out
    weights = {
        name: weight.to(dtype) if dtype is not None and weight.is_floating_point() else weight
        for name, weight in weights.items()
        if name not in left_out
    }
    if differing := expected ^ weights.keys():
        raise ValueError(
            f"These weights are not those of the model; {sorted(differing)[:3]} ... differ."
        )
    remove_weights(folder)
    files = split_state_dict_into_shards_factory(
        weights,
        get_storage_size=lambda weight: weight.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in files.filename_to_tensors.items():
        tensors = {name: torch.empty_like(weights[name], device="cpu") for name in names}
        read(tensors)
        with write_errors_name(folder / file):
            save_file(tensors, folder / file, metadata={"format": "pt"})
        del tensors
        gc.collect()  # torch's readers leave cycles that hold what they have read
    if files.is_sharded:
        index = {"metadata": files.metadata, "weight_map": files.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    floating = next(weight.dtype for weight in weights.values() if weight.is_floating_point())
    save_config(model, folder, dtype=floating)
