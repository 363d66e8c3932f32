"""The decorator that the backward passes of all subspace layers share."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Gradients = tuple[Tensor | None, ...]


def thin_backward(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Decorate the `backward` of an autograd Function that computes R instead of G.

    R is the gradient in the subspace, and G the whole gradient of the weight. The decorated
    `backward` runs without autocast, so its products keep the gradient's dtype. (In manual
    optimization, Lightning runs backward under autocast.) A second derivative raises RuntimeError,
    because the saved tensors do not determine it.
    """

    @wraps(backward)
    def without_autocast(ctx: Any, grad: Tensor) -> Gradients:
        with torch.autocast(grad.device.type, enabled=False):
            return backward(ctx, grad)

    return once_differentiable(without_autocast)
