"""transformers' Conv1D (GPT-2's linear layer, weight stored as [in, out]) in a subspace."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_ft.subspace.layers.base import SubspaceLayer
from lit_ft.subspace.layers.linear import subspace_linear


class SubspaceConv1D(SubspaceLayer, nn.Module):
    """transformers' Conv1D whose weight [in, out] moves in a subspace."""

    weight_is_transposed = True
    nf: int
    bias: nn.Parameter

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether `module` is transformers' Conv1D, recognised by the name of its class."""
        kind = type(module)
        return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"

    def forward(self, x: Tensor) -> Tensor:
        """Return x W + b [..., out], for `x` [..., in]."""
        if not torch.is_grad_enabled():
            return nn.functional.linear(x, self.weight.T, self.bias)
        return subspace_linear(
            x,
            self.weight.T,
            self.bias,
            delta=self.delta,
            basis=self.basis,
            energy=self.energy,
            side=self.side,
        )
