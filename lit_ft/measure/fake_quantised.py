"""Give a model on the meta device the 4-bit weights that it would be loaded with."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import quantize_4bit, quantize_blockwise
from torch import nn
from transformers.quantizers.auto import AutoHfQuantizer


def replace_layers(model: Any, config: Any) -> None:
    """Put bitsandbytes' layers in place of those that loading would quantise, as transformers does.

    Args:
        model: The transformers model, on the meta device.
        config: The configuration of the quantisation.

    Raises:
        ValueError: If it does not ask for bitsandbytes' 4-bit weights.
    """
    if not getattr(config, "load_in_4bit", False):
        raise ValueError("Of quantised weights, only bitsandbytes' 4-bit ones can be planned yet.")
    quantize_blockwise(torch.zeros(1))  # makes a table that bitsandbytes keeps: it must be real
    quantizer: Any = AutoHfQuantizer.from_config(config, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map=None)
    quantizer.postprocess_model(model)


def quantise(layer: nn.Module) -> None:
    """Quantise the weight of bitsandbytes' layer, which is on the meta device, on the CPU.

    The new weight is a plain parameter with bitsandbytes' attributes: its own class of parameters
    would hide from torch that the weight is a fake tensor.
    """
    weight: Any = layer.weight
    packed, state = quantize_4bit(
        torch.empty_like(weight, device="cpu"),
        blocksize=weight.blocksize,
        compress_statistics=weight.compress_statistics,
        quant_type=weight.quant_type,
        quant_storage=weight.quant_storage,
    )
    quantised = nn.Parameter(packed, requires_grad=False)
    vars(quantised).update(vars(weight), quant_state=state, bnb_quantized=True)
    layer.weight = quantised
    vars(layer)["quant_state"] = state
