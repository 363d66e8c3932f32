"""Add peft's adapters to models, including models on the meta device and sharded models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lit_ft.models.adapter_names import match_names
from lit_ft.models.new_tokens import with_new_rows
from lit_ft.tensors.sharding import full_tensor, shard_like


def add_adapter(model: Any, config: Any) -> PeftModel:
    """Freeze `model` and add the adapter that `config` describes.

    Some initialisations (PiSSA, arXiv:2404.02948; OLoRA, arXiv:2406.01775) rewrite the frozen
    weights, so that the trained adapter fits only the rewritten weights. In this case the returned
    model keeps the initial adapter as `initial_adapter`. With it, `export_model` converts the
    trained adapter into one for the original weights.

    Rows that `resize_embeddings` added to the embedding and the head are trained too.

    If the model is on the meta device, the adapter still gets values at once. Call
    `start_magnitudes` when the model's own weights are loaded.

    Args:
        model: A transformers model, with its weights loaded or on the meta device.
        config: The adapter's configuration, any `peft.PeftConfig`.

    Raises:
        ValueError: If a name in `config.target_modules`, or in another of its lists, matches
            nothing in the model, or if the weight of a matching layer is tied to another layer.
    """
    match_names(model, config)
    config = with_new_rows(model, config)
    if getattr(model, "is_quantized", False):
        # CausalLMModule sets activation checkpointing; this only makes norms and head float32.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # type: ignore[no-untyped-call]
        for module in model.modules():
            # On CPUs with AVX512-BF16 the first evaluation would repack the weights for bfloat16
            # arithmetic, and training and export would use the repacked ones.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    with _zeros_for_values_to_come(model):
        adapted = cast(PeftModel, get_peft_model(model, config))
    _no_tied_layers(adapted)
    initial = (
        {name: p.detach().clone() for name, p in adapted.named_parameters() if "lora_" in name}
        if rewrites_base_weights(adapted)
        else None
    )
    # Not a submodule or buffer: it is not part of the model's state.
    vars(adapted)["initial_adapter"] = initial
    return adapted


def rewrites_base_weights(model: PeftModel) -> bool:
    """Whether the adapter's initialisation changed the frozen weights, as PiSSA's does."""
    init = getattr(model.active_peft_config, "init_lora_weights", True)
    return isinstance(init, str) and init.lower().split("_")[0] in {
        "pissa",
        "olora",
        "corda",
        "loftq",
    }


@torch.no_grad()
def start_magnitudes(model: nn.Module) -> None:
    """Set DoRA's magnitudes [m] to the row norms of the weights [m, n] (arXiv:2402.09353).

    If the weights are loaded after the adapter is added, call this once they are loaded. On a
    sharded model, call it on every rank; it gathers the weights of one layer at a time.
    """
    for layer in model.modules():
        for name, magnitude in getattr(layer, "lora_magnitude_vector", {}).items():
            gathered = _gathered(layer)
            gathered.lora_variant[name].init(gathered, adapter_name=name)
            started = gathered.lora_magnitude_vector[name].weight
            magnitude.weight.copy_(shard_like(started.detach(), magnitude.weight))


@contextmanager
def in_place_of_adapters(model: nn.Module, stand_in: Callable[[Any], nn.Module]) -> Iterator[None]:
    """Inside the context, replace each layer that has an adapter by `stand_in(layer)`."""
    modules = model.named_modules()
    layers = {name: module for name, module in modules if isinstance(module, BaseTunerLayer)}
    try:
        for name, layer in layers.items():
            model.set_submodule(name, stand_in(layer))
        yield
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, cast(nn.Module, layer))


def base_layer_of(layer: Any) -> nn.Module:
    """Return the layer that an adapter is attached to."""
    base: nn.Module = layer.get_base_layer()
    return base


@torch.no_grad()
def merged_layer(layer: Any) -> nn.Module:
    """Return a copy of the layer that an adapter is attached to, with the adapter merged.

    On a sharded model, call this on every rank. The whole layer is gathered for the merge, and each
    rank gets its part of the result.
    """
    base, gathered = base_layer_of(layer), _gathered(layer)
    gathered.merge()
    merged = base_layer_of(gathered)
    for name, parameter in merged.named_parameters():
        merged.register_parameter(
            name, nn.Parameter(shard_like(parameter, base.get_parameter(name)), False)
        )
    return merged


def _no_tied_layers(model: PeftModel) -> None:
    """Raise ValueError if merging an adapter would change another layer too."""
    base: Any = model.get_base_model()
    tied = {*base.all_tied_weights_keys, *base.all_tied_weights_keys.values()}
    for name, layer in base.named_modules():
        if isinstance(layer, BaseTunerLayer) and f"{name}.weight" in tied:
            raise ValueError(
                f"The weight of {name} is tied to another layer, so an adapter on one of them "
                "cannot be merged: leave it out of target_modules."
            )


def _gathered(layer: nn.Module) -> Any:
    """Return a copy of `layer` with its whole weights, gathered from all ranks."""
    return copy.deepcopy(
        layer, {id(p): nn.Parameter(full_tensor(p).clone(), False) for p in layer.parameters()}
    )


@contextmanager
def _zeros_for_values_to_come(model: nn.Module) -> Iterator[None]:
    """Inside the context, replace parameters on the meta device by zeros that take no memory.

    peft moves the tensors of a new adapter to the device of the layer's weights. On the meta
    device, the tensors would lose their values. Parameters that are frozen inside the context stay
    frozen after it.
    """
    meta = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.is_meta
    ]
    for module, name, parameter in meta:
        zeros = torch.zeros((), dtype=parameter.dtype, device="cpu").expand(parameter.shape)
        module.register_parameter(name, nn.Parameter(zeros, parameter.requires_grad))
    try:
        yield
    finally:
        for module, name, parameter in meta:
            parameter.requires_grad_(module.get_parameter(name).requires_grad)
            module.register_parameter(name, parameter)
