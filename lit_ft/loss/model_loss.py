"""The loss that a model computes itself, as a sum over target tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_ft.loss.chunked import unwrap_peft
from lit_ft.loss.targets import IGNORE_INDEX


@dataclass
class ModelLoss:
    """The loss that the model computes itself, for models that cap their logits or add losses."""

    def __call__(self, model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """Return the loss summed over the batch, a scalar; `labels` [B, T] are not shifted."""
        loss, _ = self.with_router(model, inputs, labels)
        return loss

    def with_router(
        self, model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return the loss as `__call__` does, and the part of it that is the router's.

        A mixture of experts adds the loss of its router to the cross-entropy, times a coefficient
        of its configuration, if `output_router_logits` is set there. It adds it once a batch, so
        the sum over the batch counts it once for each target token.

        Returns:
            The loss summed over the batch, with the router's part, and that part without a graph;
            None for the latter if the model has no such loss.
        """
        num_targets = (labels[:, 1:] != IGNORE_INDEX).sum()
        output = model(**inputs, labels=labels, use_cache=False)

        def summed(mean: Tensor) -> Tensor:
            # A mean over no targets is 0/0.
            return torch.where(num_targets > 0, mean, torch.zeros_like(mean)) * num_targets

        router = getattr(output, "aux_loss", None)
        coefficient = getattr(unwrap_peft(model), "router_aux_loss_coef", None)
        if not isinstance(router, Tensor) or coefficient is None:
            return summed(output.loss), None
        return summed(output.loss), summed(coefficient * router.detach().to(output.loss))
