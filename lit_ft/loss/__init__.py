"""The training loss: a sum over target tokens, from which each step takes the mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_ft.compat.lazy import on_demand
from lit_ft.loss.targets import IGNORE_INDEX

if TYPE_CHECKING:
    from lit_ft.loss.chunked import (
        ChunkedCrossEntropy,
        TokenLoss,
        chunked_cross_entropy,
        unwrap_peft,
    )
    from lit_ft.loss.model_loss import ModelLoss
    from lit_ft.loss.token_mean import TokenMean

__all__ = [
    "IGNORE_INDEX",
    "ChunkedCrossEntropy",
    "ModelLoss",
    "TokenLoss",
    "TokenMean",
    "chunked_cross_entropy",
    "unwrap_peft",
]

__getattr__ = on_demand(
    __name__,
    {
        "ChunkedCrossEntropy": "lit_ft.loss.chunked",
        "ModelLoss": "lit_ft.loss.model_loss",
        "TokenLoss": "lit_ft.loss.chunked",
        "TokenMean": "lit_ft.loss.token_mean",
        "chunked_cross_entropy": "lit_ft.loss.chunked",
        "unwrap_peft": "lit_ft.loss.chunked",
    },
)
