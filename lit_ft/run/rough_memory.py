"""Bounds of the memory of a run that take no plan: they say whether a plan has to be waited for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hydra.utils import instantiate

from lit_ft.run.fake_run import num_ranks

_STATE = 12  # bytes for each weight: two moments in float32, and a copy or an average
_PER_HIDDEN = 24  # tensors of a token in a block that are as wide as the residual stream
_PER_INNER = 6  # and as wide as the inside of its feed-forward network
_PER_LOGIT = 3


@dataclass(frozen=True)
class RoughMemory:
    """Bounds of the memory of a device, in bytes.

    Attributes:
        weights: The weights, which are there from the first to the last step; 0 if several ranks
            may share them, or if they are quantised.
        without_rows: More than all that does not depend on the rows: weights, gradients and state.
        at_most: More than the whole run takes.
    """

    weights: int
    without_rows: int
    at_most: int


def rough_memory(config: Mapping[str, Any]) -> RoughMemory:
    """Return the bounds for a run.

    Args:
        config: The resolved configuration, with its precision.
    """
    source = instantiate(config["model"], _convert_="all")
    model_config = source.load_config()
    count = sum(parameter.numel() for parameter in source.build_empty(model_config).parameters())
    width = _width(source, str(config["trainer"]["precision"]))
    weights = count * width
    trained = 0 if config.get("adapter") is not None else count * (width + _STATE)
    data = config["data"]
    rows = max(data["batch_size"], data["val_batch_size"] or 0)
    tokens = data["max_length"]
    rows_take = rows * tokens * _bytes_of_token(model_config.get_text_config(), tokens)
    shared = num_ranks(config["trainer"]) > 1
    quantised = getattr(source, "quantization_config", None) is not None
    return RoughMemory(
        weights=0 if shared or quantised else weights,
        without_rows=weights + trained,
        at_most=weights + trained + rows_take,
    )


def _width(source: Any, precision: str) -> int:
    """Return the bytes of a weight."""
    dtype = str(getattr(source, "dtype", None) or precision)
    narrow = dtype in ("bf16-true", "16-true", "bfloat16", "float16")
    return 2 if narrow else 8 if "64" in dtype else 4


def _bytes_of_token(config: Any, tokens: int) -> int:
    """Return more bytes than a token takes in all blocks and the loss, in float32."""
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", 0) or 4 * hidden
    experts = getattr(config, "num_experts_per_tok", 1) or 1
    scores = 3 * config.num_attention_heads * tokens
    block = _PER_HIDDEN * hidden + _PER_INNER * inner * experts + scores
    return 4 * int(config.num_hidden_layers * block + _PER_LOGIT * config.vocab_size)
