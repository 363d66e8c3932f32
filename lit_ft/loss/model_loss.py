"""The loss that a model computes itself, as a sum over target tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_ft.loss.targets import IGNORE_INDEX


@dataclass
class ModelLoss:
    """The loss that the model computes itself, for models that cap their logits or add losses."""

    def __call__(self, model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """Return the loss summed over the batch, a scalar; `labels` [B, T] are not shifted."""
        num_targets = (labels[:, 1:] != IGNORE_INDEX).sum()
        loss = model(**inputs, labels=labels, use_cache=False).loss
        # A mean over no targets is 0/0.
        return torch.where(num_targets > 0, loss, torch.zeros_like(loss)) * num_targets
