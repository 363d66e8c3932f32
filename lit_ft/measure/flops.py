"""Floating-point operations (FLOPs) of training, counted from the model's own layers.

`peak_flops` gives the rate of a device by which they are divided for the utilisation.

A multiplication and an addition count as two operations. Only matrix products are counted, as in
PaLM's definition of model FLOPs utilisation (arXiv:2204.02311, appendix B). There are two
refinements: a frozen weight has no weight gradient, and a layer that comes before all trainable
weights has no input gradient. Operations that activation checkpointing repeats are not counted,
because they are not useful work.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from torch import nn

from lit_ft.measure.cards import card
from lit_ft.subspace import SubspaceLayer


@dataclass(frozen=True)
class TrainingFlops:
    """The FLOPs of forward and backward, as a linear function of three sizes of a batch.

    Attributes:
        per_token: The FLOPs for each token in all linear layers except the output head.
        per_head_token: The FLOPs of the output head for each token whose logits it computes.
        per_squared_length: The FLOPs of causal attention for each unit of the sum of length² over
            the sequences.
    """

    per_token: int
    per_head_token: int
    per_squared_length: int

    def of(
        self, *, num_tokens: int, sum_squared_lengths: int, num_targets: int | None = None
    ) -> int:
        """Return the FLOPs of batches with these total sizes.

        Args:
            num_tokens: The number of tokens in the batches.
            sum_squared_lengths: The sum of length² over the sequences in the batches.
            num_targets: The number of target tokens, for a loss that computes logits only at the
                targets; None if the output head computes logits for all tokens.
        """
        return (
            self.per_token * num_tokens
            + self.per_head_token * (num_tokens if num_targets is None else num_targets)
            + self.per_squared_length * sum_squared_lengths
        )


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the device's peak rate of dense matrix products in FLOP/s; None if it is not known.

    For 16-bit products on a GPU of `lit_ft.measure.cards`, it is the makers' figure for products
    that are added up in float32. All else is from Lightning's table, which is not right everywhere.
    For 16-bit products on other GeForce and workstation cards, it has the rate without tensor
    cores, half of the true one or less. For the H100 NVL it has the rate of sparse products, twice
    the true one. The L40 gets the rate of the L4, a laptop GPU that of the card with the same
    number, and a part of a split GPU (MIG) that of the whole.

    Args:
        device: The device that trains.
        dtype: The dtype of the factors of the products.
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        with suppress(ValueError):  # a card that the table lacks
            found = card(torch.cuda.get_device_name(device))
            if found.has_bfloat16 or dtype is torch.float16:
                return found.flops
    return get_available_flops(device, dtype)


def training_flops(model: nn.Module) -> TrainingFlops:
    """Count the FLOPs of a training step from the model's layers and its trainable weights.

    A linear layer [m, n] is torch's, one of its quantised subclasses or transformers' Conv1D. For
    each token it costs 2mn in forward, 2mn for the gradient of its input and 2mn for the gradient
    of its weight. If the weight moves in a subspace of rank r, the last term is 2r(m + n).

    If the model has a transformers config, attention costs 2 · width · length² for each layer in
    forward, which is the causal half, and twice that in backward. Sliding windows and linear
    attention count as full attention.

    Embeddings, norms and other weights outside linear layers, such as the fused experts of a
    mixture, are not counted. Neither are the fold and the moves of a subspace, which happen once a
    step.
    """
    layers = _linear_layers(model)
    needs_input_gradient = _input_gradients(model, layers)
    head = _call(model, "get_output_embeddings")
    per_token = per_head_token = 0
    for name, layer in layers.items():
        rows, cols = _shape(layer)
        flops = 2 * rows * cols * (1 + needs_input_gradient[name])
        if isinstance(layer, SubspaceLayer):
            flops += 2 * (rows + cols) * layer.delta.shape[1]
        elif layer.weight.requires_grad:
            flops += 2 * rows * cols
        if layer is head:
            per_head_token += flops
        else:
            per_token += flops
    return TrainingFlops(per_token, per_head_token, _attention_flops(model))


def _linear_layers(model: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) or _is_conv1d(m)}


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ in ("Conv1D", "SubspaceConv1D") and hasattr(module, "nf")


def _shape(layer: Any) -> tuple[int, int]:
    # Not the weight's shape: 4-bit weights are packed.
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return layer.nx, layer.nf


def _input_gradients(model: nn.Module, layers: dict[str, Any]) -> dict[str, bool]:
    """Return, for each layer, whether backward needs the gradient of its input.

    Backward needs it if the input depends on a trainable weight. Modules are assumed to run in the
    order in which the model lists them. Within one block (attention or MLP), the last layer is
    assumed to read the other layers' results, and the other layers the block's input. This holds
    for every decoder in transformers. peft's lora_B reads lora_A's result.
    """
    blocks: dict[str, list[str]] = {}
    for name in layers:
        blocks.setdefault(_slot(name).rpartition(".")[0], []).append(name)
    trainable_before = _has_trainable(_call(model, "get_input_embeddings"))
    needs: dict[str, bool] = {}
    for block, names in blocks.items():
        # Norms are registered after the layers that read their output.
        trainable_before |= _has_trainable_vector(model, block.rpartition(".")[0])
        readers = [n for n in names if _slot(n) != _slot(names[-1])]
        inner = trainable_before or any(_trains(layers[n]) for n in readers)
        for name in names:
            above = trainable_before if name in readers else inner
            needs[name] = above or ".lora_B." in name
        trainable_before |= any(_trains(layers[n]) for n in names)
    return needs


def _trains(layer: Any) -> bool:
    return layer.weight.requires_grad or isinstance(layer, SubspaceLayer)


def _slot(name: str) -> str:
    """Return the layer's name in the original model, without the wrappers that peft adds."""
    return re.sub(r"\.(base_layer|lora_[AB]\..*)$", "", name)


def _has_trainable_vector(model: nn.Module, path: str) -> bool:
    children = model.get_submodule(path).children()
    parameters = (p for child in children for p in child.parameters(recurse=False))
    return any(p.ndim == 1 and p.requires_grad for p in parameters)


def _has_trainable(module: Any) -> bool:
    return module is not None and any(p.requires_grad for p in module.parameters())


def _attention_flops(model: nn.Module) -> int:
    """Return the FLOPs of attention for each unit of length², in forward and backward.

    Backward counts only the layers from the first trained one on.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return 0
    text = config.get_text_config()
    heads = text.num_attention_heads
    width: int = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    layers: int = text.num_hidden_layers
    return 2 * width * (layers + 2 * (layers - _first_trainable_layer(model, layers)))


def _first_trainable_layer(model: nn.Module, layers: int) -> int:
    if _has_trainable(_call(model, "get_input_embeddings")):
        return 0
    trainable = (name for name, p in model.named_parameters() if p.requires_grad)
    indices = (re.search(r"\.(\d+)\.", name) for name in trainable)
    return min((int(found[1]) for found in indices if found), default=layers)


def _call(model: nn.Module, method: str) -> Any:
    return getattr(model, method)() if hasattr(model, method) else None
