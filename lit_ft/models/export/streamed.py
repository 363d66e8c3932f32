"""Export weights that are not in a model, with at most one file's weights in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch import Tensor

from lit_ft.models.export.sharded import names_left_out, remove_weights, save_config


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
        model: A transformers model on the meta device, which gives the configuration.
        weights: Tensors on the meta device, with the shape and type of each weight, by the model's
            names.
        read: Fills the tensors that it is given under these names, and converts their type.
        folder: An existing folder to write to.
        dtype: The type of the written weights; None keeps each weight's own.
        max_shard_size: The largest size of a file ("5GB"), and so of the weights in memory. A
            single weight that is larger has a file of its own.

    Raises:
        ValueError: If `weights` are not those of `model`.
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
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if files.is_sharded:
        index = {"metadata": files.metadata, "weight_map": files.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    floating = next(weight.dtype for weight in weights.values() if weight.is_floating_point())
    save_config(model, folder, dtype=floating)
