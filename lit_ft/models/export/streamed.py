"""Export weights that are elsewhere than in a model, no more of them in memory than one file's."""

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
    """Write weights as `from_pretrained` loads them.

    Args:
        model: A transformers model, on the meta device.
        weights: Size and type of each weight, under the model's names, on the meta device.
        read: Fills the tensors that it is given under such names, converting their type.
        folder: Where to; it is there.
        dtype: Of the written weights; None keeps theirs.
        max_shard_size: Of a file, and so of what is in memory; a larger weight has its own file.

    Raises:
        ValueError: The weights are not those of `model`.
    """
    left_out = names_left_out(model)
    expected = model.state_dict().keys() - left_out
    weights = {
        name: weight.to(dtype) if dtype is not None and weight.is_floating_point() else weight
        for name, weight in weights.items()
        if name not in left_out
    }
    if differing := expected ^ weights.keys():
        raise ValueError(f"These weights are not those of the model: {sorted(differing)[:3]} ...")
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
