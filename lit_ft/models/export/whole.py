"""Export in the Hugging Face format, which `from_pretrained` loads without lit_ft."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_ft.models.adapters import in_place_of_adapters, merged_layer
from lit_ft.models.base import base_at
from lit_ft.models.export.card import write_cards
from lit_ft.models.export.chat import save_tokenizer, stop_at
from lit_ft.models.export.sharded import export_sharded, remove_adapter
from lit_ft.models.sources import dtype_named
from lit_ft.storage.links import remove_links
from lit_ft.storage.permissions import open_to_others
from lit_ft.storage.write_errors import write_errors_name
from lit_ft.tensors.sharding import full_tensor, is_model_sharded


def export_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    *,
    merge: bool = True,
    dtype: str | None = None,
    end_tokens: Sequence[int] = (),
) -> Path:
    """Write `model` and its tokenizer to `folder`, and return the folder.

    A model with an adapter is written with the adapter merged, and the adapter is also written by
    itself to `folder/adapter`. With `merge=False`, only the adapter is written, to `folder` itself.
    Each folder gets a model card, README.md, unless it has one that lit_ft has not written.
    All ranks write a sharded model together, so call this on every rank. `model` is not changed.

    Args:
        model: The trained model, on any device.
        tokenizer: The tokenizer to write to the same folder; None writes none.
        folder: The folder to write to, created if it is missing.
        merge: Whether to merge the adapter into the model's weights.
        dtype: The dtype of the written weights, such as "bfloat16"; None keeps the model's own.
        end_tokens: The ids of the tokens that end an answer. `generate` will stop at them and at
            the model's own.

    Raises:
        ValueError: If `dtype` is not one of torch's floating-point types. Also if only the adapter
            would be written and `folder` already holds a model, because transformers would then
            load that model with the adapter.
        OSError: If the folder cannot be written to. The message names it.
    """
    target_dtype = None if dtype is None else dtype_named(dtype)
    folder = Path(folder)
    if isinstance(model, PeftModel) and not merge and (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds a model, and transformers would add an adapter in the same folder to "
            "it: give the adapter a folder of its own."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with write_errors_name(folder):
        if not dist.is_initialized() or dist.get_rank() == 0:
            for place in (folder, folder / "adapter"):
                remove_links(place)
        if is_model_sharded(model):
            _export_together(model, folder, merge=merge, dtype=target_dtype)
            if dist.get_rank() != 0:
                return folder
        else:
            _export_here(model, folder, merge=merge, dtype=target_dtype)
        for place in (folder, folder / "adapter"):
            open_to_others(place)
        stop_at(folder, end_tokens)
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder)
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        adapter = model.active_peft_config if isinstance(model, PeftModel) else None
        write_cards(folder, base_at(str(getattr(base, "name_or_path", ""))), adapter)
    return folder


def _export_together(model: Any, folder: Path, *, merge: bool, dtype: torch.dtype | None) -> None:
    base = model
    if isinstance(model, PeftModel):
        adapter = {name: full_tensor(p) for name, p in model.named_parameters() if p.requires_grad}
        if dist.get_rank() == 0:
            with _without_card(model):
                target = folder / "adapter" if merge else folder
                model.save_pretrained(str(target), state_dict=adapter)
        if not merge:
            return
        base = model.get_base_model()
    with in_place_of_adapters(base, merged_layer):
        export_sharded(base, folder, dtype=dtype)


def _export_here(
    model: PreTrainedModel | PeftModel, folder: Path, *, merge: bool, dtype: torch.dtype | None
) -> None:
    base: Any = model
    if isinstance(model, PeftModel):
        _save_adapter(model, folder / "adapter" if merge else folder)
        if not merge:
            return
        base = merged(model)
    if dtype is not None:
        base = copied_to_host(base) if base is model else base
        base.to(dtype)
    remove_adapter(folder)
    base.save_pretrained(folder)


@torch.no_grad()
def merged(model: PeftModel) -> Any:
    """Return a copy of `model` with the adapter merged and 4-bit weights dequantised.

    The copy is in host memory, because a GPU that trains an adapter seldom has room for the weights
    twice; and 4-bit weights are four times as large once they are dequantised.
    """
    clone = copied_to_host(model)
    if not getattr(model.get_base_model(), "is_quantized", False):
        return clone.merge_and_unload()
    # In 4-bit weights, rounding would undo the merge: merge into dequantised weights instead.
    config, state = copy.deepcopy(clone.active_peft_config), get_peft_model_state_dict(clone)
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = False  # PiSSA's and others would rewrite the weights again
    whole_model: Any = get_peft_model(clone.unload().dequantize(), config)
    set_peft_model_state_dict(whole_model, state)
    return whole_model.merge_and_unload()


@torch.no_grad()
def copied_to_host(model: Any) -> Any:
    """Return a deep copy whose weights are in host memory, without copies on the device."""
    # `deepcopy` takes what it finds here in place of a copy of its own.
    copies: dict[int, Any] = {id(p): _on_host(p) for p in model.parameters()}
    copies |= {id(buffer): buffer.to("cpu", copy=True) for buffer in model.buffers()}
    return copy.deepcopy(model, copies)


def _on_host(parameter: torch.nn.Parameter) -> Any:
    """Return a copy of a parameter in host memory."""
    if type(parameter) is not torch.nn.Parameter:
        # bitsandbytes' `to` knows no copies, and moves the scales of the parameter itself: so one
        # at a time is copied before.
        quantised: Any = copy.deepcopy(parameter)
        return quantised.to("cpu")
    return torch.nn.Parameter(parameter.to("cpu", copy=True), parameter.requires_grad)


def _save_adapter(model: PeftModel, folder: Path) -> None:
    initial = getattr(model, "initial_adapter", None)
    if initial is None:
        with _without_card(model):
            model.save_pretrained(str(folder))
        return
    with tempfile.TemporaryDirectory() as before, _without_card(model):
        # peft reads the initial adapter from this folder, and subtracts it from the trained
        # adapter. The difference fits the original weights.
        tensors = {
            name.replace(".default", ""): p.contiguous().cpu() for name, p in initial.items()
        }
        save_file(tensors, Path(before) / "adapter_model.safetensors")
        model.save_pretrained(str(folder), path_initial_model_for_weight_conversion=before)


@contextmanager
def _without_card(model: PeftModel) -> Iterator[None]:
    """Keep `save_pretrained` from writing to README.md, which may be the user's.

    What peft would write names the path from which the base was loaded, and says no more than
    `write_cards` does.
    """
    vars(model)["create_or_update_model_card"] = lambda output_dir: None
    try:
        yield
    finally:
        del vars(model)["create_or_update_model_card"]
