"""The size of a model, and how much of it is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from lit_ft.measure.memory import weight_bytes
from lit_ft.measure.storage_bytes import storage_bytes
from lit_ft.subspace import subspace_layers


@dataclass(frozen=True)
class ModelSize:
    """The number of weights in a model. Tied weights count once, packed weights as unpacked.

    Attributes:
        parameters: The number of weights of the model.
        trainable_parameters: The number of weights that training changes. A matrix that is trained
            in a subspace counts with all its weights.
        subspace_parameters: The number of values in the small parameters that GaLore trains in
            subspaces. They are not weights of the model.
        weight_bytes: The bytes that the weights occupy on this rank.
    """

    parameters: int
    trainable_parameters: int
    subspace_parameters: int
    weight_bytes: int


def model_size(model: nn.Module) -> ModelSize:
    """Return the size of `model`, some of whose layers may be in subspaces."""
    layers = subspace_layers(model).values()
    deltas, moving = {layer.delta for layer in layers}, {layer.weight for layer in layers}
    weights = [p for p in model.parameters() if p not in deltas]
    beside = storage_bytes([tensor for layer in layers for tensor in (layer.delta, layer.basis)])
    return ModelSize(
        parameters=sum(map(num_weights, weights)),
        trainable_parameters=sum(num_weights(p) for p in weights if p.requires_grad or p in moving),
        subspace_parameters=sum(map(num_weights, deltas)),
        weight_bytes=weight_bytes(model) - beside,
    )


def num_weights(parameter: Any) -> int:
    """Return the number of weights that a parameter stands for."""
    # bitsandbytes packs two 4-bit weights into a byte, and keeps the true shape in `quant_state`.
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    size: int = parameter.numel() if shape is None else math.prod(shape)
    return size
