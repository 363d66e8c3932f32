"""The base class of layers in a subspace: a small parameter, its basis, and the fold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_ft.tensors.row_blocks import rows_per_block
from lit_ft.tensors.sharding import first_row, full_tensor, is_sharded, local
from lit_ft.tensors.stochastic_rounding import (
    keyed_generator,
    random_bits,
    round_moved,
    round_stochastically,
)

Side = Literal["right", "left"]
Sides = Literal["right", "left", "std"]


class SubspaceLayer(nn.Module):
    """A layer whose frozen weight W moves by α S P, where only S is trained.

    `delta` is the parameter S [rows, r], which is zero whenever the model runs. It may then share
    one zero in memory, see `release_delta`. `basis` is the buffer P [r, cols], in the dtype of the
    weight. Its rows are orthonormal, except under the projector `Online`; in bfloat16, they are so
    to three digits. The gradient of `delta` is the weight's gradient in the coordinates of P.

    If `basis.requires_grad`, a backward pass leaves the sketch H [r, cols] in `basis.grad`. If
    `energy.requires_grad`, it leaves two gradient energies in `energy.grad` [2]: the energy that P
    captures, and the total. Both are in float32 or wider.

    On the right side, the rows of S are W's outputs, and P spans W's inputs. On the left side, it
    is the other way round. Tied layers share `delta`, `basis` and `energy`.
    """

    weight: Tensor
    delta: nn.Parameter
    basis: Tensor
    energy: Tensor  # no parameter and no buffer: never stepped, broadcast, saved or exported
    side: Side
    weight_is_transposed = False  # stored as [in, out]
    rows_are_tokens = False  # in embeddings, the head, and what is tied to them

    def side_of(self, sides: Sides, rank: int) -> Side:
        """Return this layer's side; "std" is the shorter one (right if equal), as in galore-torch.

        On the shorter side, a basis of the same rank captures more of the gradient, and `delta` is
        larger. If the rank fills the shorter side, the basis goes there whatever `sides` says, and
        captures the whole gradient. Layers whose rows are tokens are always on the right side.
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
        """Freeze the weight; add `delta` = 0 [rows, rank] and a random `basis` [rank, cols]."""
        self.side = side
        rows, cols = self.moving_weight.shape
        # float32 even for 16-bit weights: the optimizer's steps are small.
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        # Never on the meta device: loading fills in the weights, but not these tensors.
        device = torch.device("cpu") if self.weight.is_meta else self.weight.device
        self.weight.requires_grad_(False)
        self.delta = nn.Parameter(torch.zeros(rows, rank, dtype=dtype, device=device))
        # On the generator's device: while Lightning builds a model, the default may be a GPU.
        start = torch.randn(cols, rank, dtype=dtype, generator=generator, device="cpu")
        basis = _orthonormal_columns(start).T.clone(memory_format=torch.contiguous_format)
        self.register_buffer("basis", basis.to(device, self.weight.dtype))
        self.energy = torch.zeros(2, dtype=dtype, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # The basis changes in place, as parameters do, so that tied layers keep sharing it. The
        # others do not go below float32: a cast to bfloat16 (bf16-true) is not meant for them.
        small: dict[str, Any] = {
            "delta": self._parameters.pop("delta"),
            "basis": self._buffers.pop("basis"),
        }
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for tensor in (*small.values(), self.energy):
            moved = fn(tensor.detach())
            if moved.itemsize < tensor.itemsize and tensor is not small["basis"]:
                dtype = torch.promote_types(moved.dtype, torch.float32)
                moved = tensor.detach().to(moved.device, dtype)
            if is_sharded(tensor):  # setting its `.data` does not change the local rows
                if (moved.dtype, moved.device) != (tensor.dtype, tensor.device):
                    torch.utils.swap_tensors(tensor, nn.Parameter(moved))  # type: ignore[no-untyped-call]
                continue
            gradient, tensor.grad = tensor.grad, None
            tensor.data = moved
            tensor.grad_dtype = torch.promote_types(moved.dtype, torch.float32)
            if gradient is not None:
                tensor.grad = gradient.to(moved.device, tensor.grad_dtype)
        self._parameters["delta"], self._buffers["basis"] = small["delta"], small["basis"]
        return self

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        self.store_delta()  # what is loaded is copied into it
        saved = state_dict.get(f"{prefix}basis")
        if saved is not None and saved.shape != self.basis.shape:
            raise ValueError(
                f"{prefix}basis is {list(saved.shape)} in the checkpoint and "
                f"{list(self.basis.shape)} here: resume with rank={len(saved)}, or start from the "
                "exported weights."
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @property
    def moving_weight(self) -> Tensor:
        """The weight W as [rows, cols]. It is a view, so writing to it changes the weight."""
        return self.weight.data.mT if self.views_transposed else self.weight.data

    @property
    def rank(self) -> int:
        """The rank r: the number of rows of the basis."""
        return self.basis.shape[0]

    @property
    def wide_basis(self) -> Tensor:
        """The basis [r, cols] in float32 or wider, without a graph: itself if it is so."""
        return self.basis.detach().to(torch.promote_types(self.basis.dtype, torch.float32))

    def record_sketches(self, wanted: bool) -> None:
        """Let backward passes leave the sketch in `basis.grad`, or no longer.

        Sketches add up in float32. In a compiled model, that of each backward pass is first rounded
        to the dtype of the basis.
        """
        # In bfloat16, a sum over micro-batches would lose small terms. A copy of the layer has to
        # be told again.
        self.basis.grad_dtype = torch.promote_types(self.basis.dtype, torch.float32)
        self.basis.requires_grad_(wanted)

    def as_basis(self, moved: Tensor, *, generator: torch.Generator) -> Tensor:
        """Return `moved` [r, cols] in the dtype of the basis.

        It is rounded to bfloat16 stochastically: small steps of a basis would otherwise be lost.

        Args:
            moved: A new basis, in float32 or wider.
            generator: The source of random bits, on the basis's device.
        """
        if self.basis.dtype is torch.bfloat16:
            return round_stochastically(moved.float(), generator=generator)
        return moved.to(self.basis.dtype)

    def store_delta(self) -> None:
        """Give `delta` memory for all its elements, which are zero, so that it can be stepped."""
        if not self.delta.is_contiguous():
            self.delta.data = torch.zeros_like(
                self.delta.data, memory_format=torch.contiguous_format
            )

    def release_delta(self) -> None:
        """Free the memory of `delta` while it is zero: all its elements become one number."""
        if not is_sharded(self.delta):
            self.delta.data = self.delta.new_zeros(()).expand(self.delta.shape)

    def clear_basis_input(self) -> None:
        """Clear what backward passes have left in `grad` to move or measure the basis."""
        self.basis.grad = self.weight.grad = self.energy.grad = None

    @torch.no_grad()
    def fold(self, *, scale: float, decay: float, rounding_key: tuple[int, ...] = ()) -> None:
        """Set W ← (1 − decay) W + scale · S P, then S ← 0 (arXiv:2403.03507, eq. 4).

        If the weight is sharded, each rank updates the rows that it holds.

        Args:
            scale: The scale α, by which the step S P is multiplied.
            decay: The fraction by which W shrinks: the learning rate times the weight decay.
            rounding_key: The integers that seed the stochastic rounding of 16-bit weights, such as
                (seed, step, layer).
        """
        weight, first = local(self.weight), first_row(self.weight)
        basis = self.wide_basis.to(weight.device)  # FSDP2 offloads parameters, not buffers
        if self.views_transposed:  # the stored weight moves by Pᵀ Sᵀ
            left, right = basis.T[first : first + len(weight)], full_tensor(self.delta).T
        else:
            left, right = local(self.delta), basis
        if weight.dtype is right.dtype:
            weight.addmm_(left, right, beta=1 - decay, alpha=scale)
            self.delta.zero_()
            return
        rows_a_block = rows_per_block(weight.shape[1], weight.device)
        left = left * scale
        if weight.is_cuda and torch.version.cuda:  # the loss is small next to the rounding
            left, right = left.to(weight.dtype), right.to(weight.dtype)
        for begin in range(first - first % rows_a_block, first + len(weight), rows_a_block):
            end = min(begin + rows_a_block, len(self.weight))
            held = slice(max(begin - first, 0), min(end - first, len(weight)))
            step = _product(left[held], right)
            # A block that ranks share is rounded with the bits that it would have in one process.
            generator = keyed_generator(weight.device, *rounding_key, begin)
            block = (end - begin, weight.shape[1])
            bits = random_bits(block, weight.device, generator=generator)
            own = bits[first + held.start - begin :][: len(step)]
            weight[held] = round_moved(weight[held], step, own, keep=1 - decay)
            del step, bits, own  # before the next block's are made
        self.delta.zero_()

    @property
    def views_transposed(self) -> bool:
        """Whether `moving_weight` is the transpose of the stored weight."""
        return (self.side == "left") != self.weight_is_transposed


def _orthonormal_columns(tensor: Tensor) -> Tensor:
    """Return Q of the QR factorisation of a tensor on the CPU, with one thread.

    In a factorisation of this size, two threads mostly wait for each other: where other processes
    use the cores, it takes 0.5 s instead of 1 ms. The result does not depend on the cores either.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        columns: Tensor = torch.linalg.qr(tensor).Q
        return columns
    finally:
        torch.set_num_threads(threads)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return left · right in float32 or wider."""
    if left.dtype.itemsize < 4:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right
