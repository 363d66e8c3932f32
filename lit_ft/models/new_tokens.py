"""Give a model a row for each token of its tokenizer, and let an adapter train the new rows."""

from __future__ import annotations

import copy
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_ft.compat import remedies
from lit_ft.compat.refusal import Refusal
from lit_ft.data.token_ids import num_ids
from lit_ft.tensors.stochastic_rounding import own_gpu


def add_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Add the rows that the tokenizer's tokens lack to a model's embedding and head, in place.

    The new rows start near the mean of the others (transformers' default). They are the same in
    every process. Rows are never taken away: many embeddings have more of them than tokens.

    Args:
        model: The model, with its weights or on the meta device.
        tokenizer: The tokenizer of the model; None adds nothing.
    """
    rows = _embedding(model).num_embeddings
    if tokenizer is None or num_ids(tokenizer) <= rows:
        return
    is_empty = _embedding(model).weight.is_meta
    with torch.random.fork_rng(devices=own_gpu()):
        torch.manual_seed(0)
        model.resize_token_embeddings(num_ids(tokenizer), mean_resizing=not is_empty)
    vars(model)["first_new_row"] = rows


def with_new_rows(model: Any, config: Any) -> Any:
    """Return an adapter's configuration with which the rows that `add_rows` added are trained too.

    Under an adapter they would stay as they start, all of them the same.

    Args:
        model: The model that the adapter is for.
        config: The adapter's configuration. It is not changed, and returned as it is if nothing was
            added, or if it says itself which tokens are trained.

    Raises:
        Refusal: If this kind of adapter cannot train single rows.
    """
    first: int | None = getattr(model, "first_new_row", None)
    if first is None or getattr(config, "trainable_token_indices", None):
        return config
    names = {module: name for name, module in model.named_modules()}
    saved = getattr(config, "modules_to_save", None) or []
    if any(names[_embedding(model)].endswith(name) for name in saved):
        return config
    if not hasattr(config, "trainable_token_indices"):
        raise Refusal(
            f"{type(config).__name__} would leave the new rows of the embedding as they start",
            remedies.LORA,
            remedies.ADAPTER_NONE,
        )
    new = list(range(first, _embedding(model).num_embeddings))
    tables = [_embedding(model)]
    if not model.all_tied_weights_keys:
        tables.append(model.get_output_embeddings())
    config = copy.deepcopy(config)
    config.trainable_token_indices = {names[table]: new for table in tables}
    rank_zero_info(f"The {len(new):,} new rows of the embedding are trained with the adapter.")
    return config


def _embedding(model: PreTrainedModel) -> nn.Embedding:
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    return embedding
