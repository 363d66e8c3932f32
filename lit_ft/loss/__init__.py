"""The training loss: a sum over target tokens, from which each step takes the mean."""

from lit_ft.loss.chunked import ChunkedCrossEntropy, TokenLoss, chunked_cross_entropy, unwrap_peft
from lit_ft.loss.model_loss import ModelLoss
from lit_ft.loss.targets import IGNORE_INDEX
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
