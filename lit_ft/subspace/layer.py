"""What the layers trained in a subspace share: a small parameter, its basis, and the fold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_ft.rounding import round_stochastically

Side = Literal["right", "left"]
MATCH_ADAMW = "match_adamw"

# Rows of a 16-bit weight that are in float32 at a time while a step is folded into them.
_ROWS_A_BLOCK = 1024


class SubspaceLayer(nn.Module):
    """A layer whose frozen weight W moves by α S P, where S alone is trained.

    `delta` is S [rows, r], a parameter, zero whenever the model runs; its gradient is the weight's
    gradient in the coordinates of `basis`, P [r, cols] with orthonormal rows, a buffer. With
    `basis.requires_grad` a backward pass leaves the sketch H in `basis.grad`. On the right side the
    rows are W's outputs and P spans its inputs; on the left side the other way round. Layers with
    tied weights share `delta` and `basis`.
    """

    weight: Tensor
    delta: nn.Parameter
    basis: Tensor
    side: Side
    weight_is_transposed = False  # stored as [in, out]

    def enter_subspace(
        self, rank: int, side: Side, *, generator: torch.Generator | None = None
    ) -> None:
        """Freeze the weight and give the layer `delta` = 0 and a random orthonormal `basis`."""
        self.side = side
        rows, cols = self.moving_weight.shape
        # float32 even beside 16-bit weights: small, and the optimizer's steps on it are too.
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        device = self.weight.device
        self.weight.requires_grad_(False)
        self.delta = nn.Parameter(torch.zeros(rows, rank, dtype=dtype, device=device))
        start = torch.randn(cols, rank, dtype=dtype, generator=generator)
        self.register_buffer("basis", torch.linalg.qr(start).Q.T.contiguous().to(device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Moved in place, as parameters are, so that tied layers go on sharing one basis; and never
        # below float32: casting a model to bfloat16 (Lightning's bf16-true) means its weights.
        small: dict[str, Any] = {
            "delta": self._parameters.pop("delta"),
            "basis": self._buffers.pop("basis"),
        }
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for tensor in small.values():
            moved = fn(tensor.detach())
            if moved.itemsize < tensor.itemsize:
                moved = tensor.detach().to(moved.device)
            tensor.data = moved
            if tensor.grad is not None:
                tensor.grad.data = tensor.grad.detach().to(moved)
        self._parameters["delta"], self._buffers["basis"] = small["delta"], small["basis"]
        return self

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        saved = state_dict.get(f"{prefix}basis")
        if saved is not None and saved.shape != self.basis.shape:
            raise ValueError(
                f"{prefix}basis is {list(saved.shape)} in the checkpoint and "
                f"{list(self.basis.shape)} here: go on with rank={len(saved)}, or start from the "
                "exported weights."
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @property
    def moving_weight(self) -> Tensor:
        """W as [rows, cols]: a view that writes through to the weight."""
        return self.weight.data.mT if self.views_transposed else self.weight.data

    @property
    def rank(self) -> int:
        """Rows of the basis."""
        return self.basis.shape[0]

    @property
    def matching_scale(self) -> float:
        """α = √(cols / r): an update of RMS 1 in S has RMS 1 in α S P too."""
        return math.sqrt(self.basis.shape[1] / self.rank)

    def begin_window(self) -> None:
        """Forget what a skipped step left behind: without a gradient of S, a window begins."""
        if self.delta.grad is None:
            self.basis.grad = self.weight.grad = None

    @torch.no_grad()
    def fold(self, *, scale: float, decay: float, generator: torch.Generator | None = None) -> None:
        """W ← (1 − decay) W + scale · S P, then S ← 0 (arXiv:2403.03507, eq. 4).

        Args:
            scale: α.
            decay: Learning rate times weight decay.
            generator: Random bits that round 16-bit weights; on the weight's device.
        """
        weight = self.moving_weight
        if weight.dtype is self.delta.dtype:
            weight.addmm_(self.delta, self.basis, beta=1 - decay, alpha=scale)
        else:
            assert generator is not None
            for begin in range(0, len(weight), _ROWS_A_BLOCK):
                block = slice(begin, begin + _ROWS_A_BLOCK)
                moved = torch.addmm(
                    weight[block].to(self.delta.dtype),
                    self.delta[block],
                    self.basis,
                    beta=1 - decay,
                    alpha=scale,
                )
                weight[block] = round_stochastically(moved, generator=generator)
        self.delta.zero_()

    @property
    def views_transposed(self) -> bool:
        """Whether `moving_weight` is the stored weight's transpose."""
        return (self.side == "left") != self.weight_is_transposed
