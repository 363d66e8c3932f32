"""What the layers trained in a subspace share: a small parameter, its basis, and the fold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_ft.tensors.row_blocks import rows_per_block
from lit_ft.tensors.sharding import first_row, full_tensor, is_sharded, local
from lit_ft.tensors.stochastic_rounding import keyed_generator, random_bits, round_moved

Side = Literal["right", "left"]
Sides = Literal["right", "left", "std"]


class SubspaceLayer(nn.Module):
    """A layer whose frozen weight W moves by α S P, where S alone is trained.

    `delta` is S [rows, r], a parameter, zero whenever the model runs; its gradient is the weight's
    gradient in the coordinates of `basis`, P [r, cols] with orthonormal rows, a buffer. With
    `basis.requires_grad` a backward pass leaves the sketch H in `basis.grad`; with
    `energy.requires_grad` it leaves in `energy.grad` [2] how much of the gradient's energy P
    captures, and all of it. On the right side the rows are W's outputs and P spans its inputs; on
    the left side the other way round. Layers with tied weights share `delta`, `basis` and `energy`.
    """

    weight: Tensor
    delta: nn.Parameter
    basis: Tensor
    energy: Tensor  # neither parameter nor buffer: not to be stepped, broadcast, saved or exported
    side: Side
    weight_is_transposed = False  # stored as [in, out]
    rows_are_tokens = False  # an embedding's or the head's, or tied to such

    def side_of(self, sides: Sides, rank: int) -> Side:
        """Return this layer's side: "std" is the shorter one, as in galore-torch; right of equals.

        There a basis of the same rank captures more, for a larger `delta`. A rank that fills the
        shorter side has its basis there, whatever `sides` says: it captures all. Rows of tokens are
        always on the right side.
        """
        if self.rows_are_tokens:
            return "right"
        outputs, inputs = self.weight.shape[:: -1 if self.weight_is_transposed else 1]
        fills = rank >= min(outputs, inputs) and outputs != inputs
        if sides != "std" and not fills:
            return sides
        return "right" if inputs <= outputs else "left"

    def enter_subspace(
        self, rank: int, side: Side, *, generator: torch.Generator | None = None
    ) -> None:
        """Freeze the weight and give the layer `delta` = 0 and a random orthonormal `basis`."""
        self.side = side
        rows, cols = self.moving_weight.shape
        # float32 even beside 16-bit weights: small, and the optimizer's steps on it are too.
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        # Values that are still to come do not take these along.
        device = torch.device("cpu") if self.weight.is_meta else self.weight.device
        self.weight.requires_grad_(False)
        self.delta = nn.Parameter(torch.zeros(rows, rank, dtype=dtype, device=device))
        # On the CPU, where its generator is: Lightning builds modules with a GPU as the default.
        start = torch.randn(cols, rank, dtype=dtype, generator=generator, device="cpu")
        basis = torch.linalg.qr(start).Q.T.clone(memory_format=torch.contiguous_format)
        self.register_buffer("basis", basis.to(device))
        self.energy = torch.zeros(2, dtype=dtype, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Moved in place, as parameters are, so that tied layers go on sharing one basis; and never
        # below float32: casting a model to bfloat16 (Lightning's bf16-true) means its weights.
        small: dict[str, Any] = {
            "delta": self._parameters.pop("delta"),
            "basis": self._buffers.pop("basis"),
        }
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for tensor in (*small.values(), self.energy):
            moved = fn(tensor.detach())
            if moved.itemsize < tensor.itemsize:
                dtype = torch.promote_types(moved.dtype, torch.float32)
                moved = tensor.detach().to(moved.device, dtype)
            if is_sharded(tensor):  # its `.data` does not reach the rows that it holds
                if (moved.dtype, moved.device) != (tensor.dtype, tensor.device):
                    torch.utils.swap_tensors(tensor, nn.Parameter(moved))  # type: ignore[no-untyped-call]
                continue
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

    def clear_basis_input(self) -> None:
        """Drop what backward passes have left for a move of the basis."""
        self.basis.grad = self.weight.grad = self.energy.grad = None

    @torch.no_grad()
    def fold(self, *, scale: float, decay: float, rounding_key: tuple[int, ...] = ()) -> None:
        """W ← (1 − decay) W + scale · S P, then S ← 0 (arXiv:2403.03507, eq. 4).

        Of a sharded weight each rank moves the rows that it holds.

        Args:
            scale: α.
            decay: Learning rate times weight decay.
            rounding_key: Of the random bits that round 16-bit weights, such as (seed, step, layer).
        """
        weight, first = local(self.weight), first_row(self.weight)
        basis = self.basis.to(weight.device)  # FSDP2 offloads parameters, not buffers
        if self.views_transposed:  # as it is stored, W moves by Pᵀ Sᵀ
            left, right = basis.T[first : first + len(weight)], full_tensor(self.delta).T
        else:
            left, right = local(self.delta), basis
        if weight.dtype is right.dtype:
            weight.addmm_(left, right, beta=1 - decay, alpha=scale)
            self.delta.zero_()
            return
        rows_a_block = rows_per_block(weight.shape[1], weight.device)
        left = left * scale
        if weight.is_cuda and torch.version.cuda:  # what is lost is small beside the rounding
            left, right = left.to(weight.dtype), right.to(weight.dtype)
        for begin in range(first - first % rows_a_block, first + len(weight), rows_a_block):
            end = min(begin + rows_a_block, len(self.weight))
            held = slice(max(begin - first, 0), min(end - first, len(weight)))
            step = _product(left[held], right)
            # A block that ranks share is rounded by the bits that it would take in one process.
            generator = keyed_generator(weight.device, *rounding_key, begin)
            block = (end - begin, weight.shape[1])
            bits = random_bits(block, weight.device, generator=generator)
            own = bits[first + held.start - begin :][: len(step)]
            weight[held] = round_moved(weight[held], step, own, keep=1 - decay)
        self.delta.zero_()

    @property
    def views_transposed(self) -> bool:
        """Whether `moving_weight` is the stored weight's transpose."""
        return (self.side == "left") != self.weight_is_transposed


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return left · right in float32 or wider."""
    if left.dtype.itemsize < 4:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right
