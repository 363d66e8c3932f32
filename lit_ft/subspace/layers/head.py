"""The output head in a subspace: its loss forms neither G [V, d] nor the logits of all tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lit_ft.loss.targets import IGNORE_INDEX
from lit_ft.subspace.layers.autograd import thin_backward
from lit_ft.subspace.layers.energy import captured_and_total_energy
from lit_ft.subspace.layers.linear import SubspaceLinear
from lit_ft.subspace.layers.products import projected_gradient, projected_gradient_and_sketch

_FEW = 64  # tokens whose logits are in float32 at a time


class SubspaceHead(SubspaceLinear):
    """A `SubspaceLinear` that can turn hidden states into the loss, a chunk of tokens at a time."""

    def summed_cross_entropy(self, hidden: Tensor, labels: Tensor, *, chunk_tokens: int) -> Tensor:
        """Return the next-token cross-entropy, summed over the target positions.

        The forward pass already computes all gradients: the input's, R, the sketch and the
        energies. It holds the logits of at most `chunk_tokens` tokens at a time. The backward pass
        only scales the gradients. If the sketch or the energies are needed, each chunk lies within
        one sequence. It is then one sample s of the sums over samples, so that these sums do not
        depend on how the batch is cut.

        Args:
            hidden: The hidden states of the last layer [B, T, d].
            labels: The token ids [B, T], not shifted; -100 marks positions without a target.
            chunk_tokens: The largest number of target tokens in a chunk.

        Returns:
            The sum in nats, a scalar in at least float32.
        """
        states, targets = hidden[:, :-1], labels[:, 1:]
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
        # Under autocast, products that are in float32 on purpose would be cast again.
        with torch.autocast(device, enabled=False):
            return _CrossEntropy.apply(  # type: ignore[no-any-return, no-untyped-call]
                states,
                targets,
                self.weight,
                self.bias,
                self.delta,
                self.basis,
                self.energy,
                chunk_tokens,
                dtype,
            )


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        delta: Tensor,
        basis: Tensor,
        energy: Tensor,
        chunk_tokens: int,
        dtype: torch.dtype,
    ) -> Tensor:
        states, cast_weight, cast_basis = hidden.to(dtype), weight.to(dtype), basis.to(dtype)
        accumulated = torch.promote_types(dtype, torch.float32)
        loss = hidden.new_zeros((), dtype=accumulated)
        grad_hidden = torch.zeros_like(states)
        # FSDP2 may gather the delta in bfloat16, in which a sum would lose small terms.
        gradient = torch.zeros_like(delta, dtype=torch.promote_types(delta.dtype, torch.float32))
        sketch = torch.zeros_like(basis, dtype=accumulated) if basis.requires_grad else None
        energies = torch.zeros_like(energy) if energy.requires_grad else None
        grad_weight = None
        if weight.requires_grad:
            grad_weight = torch.zeros_like(weight, dtype=gradient.dtype)
        grad_bias = None
        if bias is not None and bias.requires_grad:
            grad_bias = torch.zeros_like(bias, dtype=accumulated)
        by_sequence = sketch is not None or energies is not None
        for piece in _pieces(targets, chunk_tokens, by_sequence=by_sequence):
            x, goal = states[piece], targets[piece]
            slope = F.linear(x, cast_weight, bias if bias is None else bias.to(dtype))
            # A few tokens at a time, because the largest tensors of a step are made here.
            for few, their_goal in zip(*(torch.split(t, _FEW) for t in (slope, goal)), strict=True):
                its_loss, of_few = _loss_and_slope(few.to(accumulated), their_goal)
                loss = loss + its_loss
                if grad_bias is not None:
                    grad_bias += of_few.sum(0)
                few.copy_(of_few)
            grad_hidden[piece] = slope @ cast_weight
            x_in_basis = x @ cast_basis.T
            if sketch is None:
                gradient += projected_gradient(slope, x_in_basis)
            else:  # the piece is a sample
                sample = (t[None] for t in (slope, x, x_in_basis))
                of_piece, its_sketch = projected_gradient_and_sketch(*sample)
                gradient += of_piece
                sketch += its_sketch
            if energies is not None:
                energies += captured_and_total_energy(slope[None], x[None], x_in_basis[None], basis)
            if grad_weight is not None:
                grad_weight += slope.T @ x
        if grad_bias is not None and bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        ctx.hidden_dtype, ctx.delta_dtype = hidden.dtype, delta.dtype
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias, gradient, sketch, energies)
        return loss

    @staticmethod
    @thin_backward
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias, gradient, sketch, energies = ctx.saved_tensors
        # The sketch and the energies are products of two gradients, so they scale by the square.
        scaled = [
            tensor if tensor is None else (tensor * factor).to(dtype or tensor.dtype)
            for tensor, factor, dtype in (
                (grad_hidden, scale, ctx.hidden_dtype),
                (grad_weight, scale, None),
                (grad_bias, scale, None),
                (gradient, scale, ctx.delta_dtype),
                (sketch, scale**2, None),
                (energies, scale**2, None),
            )
        ]
        grad_hidden, grad_weight, grad_bias, gradient, sketch, energies = scaled
        return grad_hidden, None, grad_weight, grad_bias, gradient, sketch, energies, None, None


def _loss_and_slope(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed loss, and its derivative by the logits [tokens, V], which it overwrites."""
    chosen = torch.arange(len(targets), device=targets.device), targets
    loss = -logits[chosen].sum()
    top = logits.amax(1, keepdim=True)
    total = logits.sub_(top).exp_().sum(1, keepdim=True)
    logits.div_(total)[chosen] -= 1  # the softmax, minus one at the target
    return loss + (total.log() + top).sum(), logits


def _pieces(targets: Tensor, size: int, *, by_sequence: bool) -> list[tuple[Tensor, Tensor]]:
    """Cut the positions in [B, T] that have a target into pieces of at most `size` positions.

    Args:
        targets: The targets [B, T], with the ignored index where there is none.
        size: The largest number of positions in a piece.
        by_sequence: Whether each piece must lie within one sequence.

    Returns:
        The pieces, each as a pair of indices of rows and columns.
    """
    rows, columns = (targets != IGNORE_INDEX).nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=len(targets)).tolist() if by_sequence else [len(rows)]
    sizes = [min(size, n - begin) for n in counts for begin in range(0, n, size)]
    if not sizes:
        return []
    return list(zip(torch.split(rows, sizes), torch.split(columns, sizes), strict=True))
