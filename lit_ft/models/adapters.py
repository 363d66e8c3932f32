"""Adapters through peft, also on a model without values, or of which each rank holds a part."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lit_ft.tensors.sharding import full_tensor, shard_like


def add_adapter(model: Any, config: Any) -> PeftModel:
    """Freeze `model` and put the adapter that `config` (any `peft.PeftConfig`) describes onto it.

    An initialisation that rewrites the frozen weights (PiSSA, OLoRA, ...) makes an adapter that
    fits only the rewritten ones; the initial adapter is kept as `model.initial_adapter`, so that
    `export_model` can turn it into one for the original weights.

    A model without values, on the meta device, gets an adapter with values; once its own have come,
    `start_magnitudes` finishes it.

    Raises:
        ValueError: No layer of the model matches `config.target_modules` (peft's own message), or
            one does whose weight is another layer's too.
    """
    if getattr(model, "is_quantized", False):
        # Checkpointing is the module's own choice; here only norms and head become float32.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # type: ignore[no-untyped-call]
        for module in model.modules():
            # On CPUs with AVX512-BF16 the first evaluation would repack the weights for bfloat16
            # arithmetic, and training and export would go on with those.
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
    # Not as a submodule or buffer: it is no part of the model's state.
    vars(adapted)["initial_adapter"] = initial
    return adapted


def rewrites_base_weights(model: PeftModel) -> bool:
    """Whether the adapter's initialisation changed the frozen weights (PiSSA and its kin)."""
    init = getattr(model.active_peft_config, "init_lora_weights", True)
    return isinstance(init, str) and init.lower().split("_")[0] in {
        "pissa",
        "olora",
        "corda",
        "loftq",
    }


@torch.no_grad()
def start_magnitudes(model: nn.Module) -> None:
    """Let DoRA's magnitudes be the norms of the weights, which may have come after them.

    Where ranks hold parts, all of them call; each weight is gathered by itself.
    """
    for layer in model.modules():
        for name, magnitude in getattr(layer, "lora_magnitude_vector", {}).items():
            gathered = _gathered(layer)
            gathered.lora_variant[name].init(gathered, adapter_name=name)
            started = gathered.lora_magnitude_vector[name].weight
            magnitude.weight.copy_(shard_like(started.detach(), magnitude.weight))


@contextmanager
def in_place_of_adapters(model: nn.Module, stand_in: Callable[[Any], nn.Module]) -> Iterator[None]:
    """Let `stand_in(layer)` take the place of each layer of `model` that has an adapter."""
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
    """Return the layer that an adapter sits on."""
    base: nn.Module = layer.get_base_layer()
    return base


@torch.no_grad()
def merged_layer(layer: Any) -> nn.Module:
    """Return a copy of the layer that an adapter sits on, with the adapter folded in.

    Where ranks hold parts, all of them call and get theirs; the layer is whole in between.
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
    """Raise ValueError for an adapter whose merging would change another layer as well."""
    base: Any = model.get_base_model()
    tied = {*base.all_tied_weights_keys, *base.all_tied_weights_keys.values()}
    for name, layer in base.named_modules():
        if isinstance(layer, BaseTunerLayer) and f"{name}.weight" in tied:
            raise ValueError(
                f"The weight of {name} is another layer's too, and an adapter on one alone cannot "
                "be merged into it: leave it out of target_modules."
            )


def _gathered(layer: nn.Module) -> Any:
    """Return a copy of `layer` with whole weights."""
    return copy.deepcopy(
        layer, {id(p): nn.Parameter(full_tensor(p).clone(), False) for p in layer.parameters()}
    )


@contextmanager
def _zeros_for_values_to_come(model: nn.Module) -> Iterator[None]:
    """Let parameters on the meta device be zeros that take no memory meanwhile.

    peft moves what it adds to where a layer's weights are, and values would be lost there. What has
    been frozen meanwhile stays frozen.
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
