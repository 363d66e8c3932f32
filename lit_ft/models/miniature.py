"""A model of the same architecture that is small enough to compute with at once."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedConfig

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "vocab_size": 256,
    "pad_token_id": 0,
}


def with_blocks(config: PreTrainedConfig, blocks: int) -> PreTrainedConfig:
    """Return a copy of a configuration with fewer blocks, one of each kind at least.

    Raises:
        ValueError: If there are more kinds of blocks than `blocks`.
    """
    whole = config.num_hidden_layers
    smaller = copy.deepcopy(config)
    smaller.num_hidden_layers = blocks
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == whole:
            kinds = list(dict.fromkeys(value))
            if len(kinds) > blocks:
                raise ValueError(f"{name} names {len(kinds)} kinds of blocks, more than {blocks}")
            most = max(kinds, key=value.count)
            setattr(smaller, name, [most] * (blocks - len(kinds)) + kinds)
    return smaller


def miniature(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a copy of a configuration with narrow layers, few tokens and a block of each kind."""
    kinds = [
        len(set(value))
        for value in vars(config).values()
        if isinstance(value, list) and len(value) == config.num_hidden_layers
    ]
    small: Any = with_blocks(config, max([1, *kinds]))
    for name, size in _SIZES.items():
        if isinstance(getattr(small, name, None), int):
            setattr(small, name, size)
    made: PreTrainedConfig = small
    return made
