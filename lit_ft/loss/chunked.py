"""The training loss: a sum over target tokens, without forming [tokens, vocabulary] logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import LinearCrossEntropyOptions
from torch.nn.functional import cross_entropy, linear, linear_cross_entropy
from torch.utils.checkpoint import checkpoint

from lit_ft.compat.protocols import SumsCrossEntropy
from lit_ft.compat.ranges import Count
from lit_ft.loss.targets import IGNORE_INDEX
from lit_ft.tensors.sharding import is_sharded

_CHUNK_TOKENS = 256
_FLOAT16_UNIT = 64.0  # nats: float16 ends at 65,504, and 32 rows of 1,024 tokens can exceed it


class TokenLoss(Protocol):
    """A callable that sums the loss over the target tokens of a batch."""

    def __call__(self, model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """Return the loss summed over the batch's targets; `labels` [B, T] are not shifted."""


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    chunk_tokens: Count | None = None,
    repeatable: bool = False,
) -> Tensor:
    """Sum the next-token cross-entropy over the target positions, a chunk of tokens at a time.

    Positions without a target are left out before the product with the head. torch's
    `linear_cross_entropy` then holds the logits of one chunk at a time.

    Args:
        hidden: The hidden states of the last layer [B, T, d].
        weight: The weight [V, d] of the output head.
        labels: The token ids [B, T], not shifted: `hidden[:, t]` predicts `labels[:, t + 1]`. -100
            marks positions without a target.
        bias: The bias [V] of the output head; None if it has none.
        chunk_tokens: The largest number of target tokens in a chunk. None uses 256 on the CPU and
            512 on a GPU. (Each chunk reads the whole head. Torch's own choice is about T d / 2 V
            tokens for T targets, which is 8 for 512 targets of Llama 3.1 8B. On the CPU, one token
            at a time took six times as long for V = 49,152.)
        repeatable: Whether backward can run more than once over the graph, which torch's op does
            not allow. This costs one more copy of the head's gradient.

    Returns:
        The sum in nats, a float32 scalar (float64 for float64 inputs). Without any target it is
        zero and still has a graph. For bfloat16 inputs, it is rounded to 3 digits while gradients
        are recorded, and otherwise summed in float32.
    """
    if not torch.is_grad_enabled():
        head = partial(linear, weight=weight, bias=bias)
        return cross_entropy_through(head, hidden, labels, chunk_tokens=chunk_tokens)
    states, targets = _at_targets(hidden, labels)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        states, weight = states.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if chunk_tokens is None:
        chunk_tokens = _CHUNK_TOKENS if hidden.device.type == "cpu" else 2 * _CHUNK_TOKENS
    policy: Literal["compact", "auto"] = "compact" if states.dtype == torch.float32 else "auto"
    unit = _FLOAT16_UNIT if states.dtype == torch.float16 else 1.0
    summed = partial(
        linear_cross_entropy,
        target=targets,
        reduction="sum",  # has the input's dtype; the gradient is not rounded to it
        ignore_index=IGNORE_INDEX,
        weight=None if unit == 1.0 else weight.new_full(weight.shape[:1], 1.0 / unit),
        options=LinearCrossEntropyOptions(batch_chunk_size=chunk_tokens, acc_policy=policy),
    )
    loss: Tensor
    if repeatable:
        loss = _Repeatable.apply(summed, states, weight, bias)  # type: ignore[no-untyped-call]
    else:
        loss = summed(states, weight, linear_bias=bias)
    return loss.to(torch.promote_types(loss.dtype, torch.float32)) * unit


def cross_entropy_through(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    labels: Tensor,
    *,
    chunk_tokens: Count | None = None,
) -> Tensor:
    """Sum the next-token cross-entropy, chunk by chunk, from the logits that `head` computes.

    The head runs once for each chunk in forward, and again in backward. This suits a head that is
    sharded over ranks by tensor parallelism: its own forward pass gathers the logits of a chunk, so
    the loss need not know how the head is split.

    Args:
        head: The function from hidden states [tokens, d] to logits [tokens, V].
        hidden: The hidden states of the last layer [B, T, d].
        labels: The token ids [B, T], not shifted; -100 marks positions without a target.
        chunk_tokens: The largest number of target tokens in a chunk; None uses 256.

    Returns:
        The sum in nats, a scalar in float32 or wider.
    """

    def summed(states: Tensor, targets: Tensor) -> Tensor:
        logits = head(states)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE_INDEX)

    size = chunk_tokens or _CHUNK_TOKENS
    states, targets = _at_targets(hidden, labels)
    chunks = zip(torch.split(states, size), torch.split(targets, size), strict=True)
    # Backward computes the logits again, so the logits of all chunks are never kept together.
    losses: list[Tensor] = [checkpoint(summed, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.stack(losses).sum()


def _at_targets(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    targets = labels[:, 1:].reshape(-1)
    keep = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    # Without any target, one ignored position keeps the graph connected: under DDP every parameter
    # must receive a gradient on every rank.
    keep = keep if keep.numel() else keep.new_zeros(1)
    return hidden[:, :-1].reshape(-1, hidden.shape[-1])[keep], targets[keep]


class _Repeatable(torch.autograd.Function):
    """Computes the gradients in the forward pass, as the chunked op does, and keeps them."""

    @staticmethod
    def forward(
        ctx: Any,
        summed: Callable[..., Tensor],
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        inputs = {"input": states, "linear_weight": weight, "linear_bias": bias}
        leaves = {
            name: tensor if tensor is None else tensor.detach().requires_grad_(needed)
            for (name, tensor), needed in zip(inputs.items(), ctx.needs_input_grad[1:], strict=True)
        }
        with torch.enable_grad():
            loss = summed(**leaves)
        wanted = [leaf for leaf in leaves.values() if leaf is not None and leaf.requires_grad]
        found = iter(torch.autograd.grad(loss, wanted))
        ctx.save_for_backward(
            *(
                next(found) if leaf is not None and leaf.requires_grad else None
                for leaf in leaves.values()
            )
        )
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (kept if kept is None else kept * scale for kept in ctx.saved_tensors)
        return None, *scaled


@dataclass
class ChunkedCrossEntropy:
    """Cross-entropy from the hidden states and the output head, chunk by chunk.

    It is exact for models whose loss is the cross-entropy of `head(hidden)` and nothing else.
    `is_exact_for` checks whether a model is one of them.

    Args:
        chunk_tokens: The largest number of target tokens in a chunk; None chooses it by the device
            and the kind of head.
        repeatable: Whether backward can run more than once over the graph, at the cost of one more
            copy of the head's gradient.
    """

    chunk_tokens: Count | None = None
    repeatable: bool = False

    def __call__(self, model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """Return the loss in nats, summed over the batch; `labels` [B, T] are not shifted."""
        causal_lm = unwrap_peft(model)
        # With a cache, transformers would not look for packed examples.
        hidden = causal_lm.base_model(**inputs, use_cache=False).last_hidden_state
        head = causal_lm.get_output_embeddings()
        if torch.is_grad_enabled() and isinstance(head, SumsCrossEntropy):
            # A head in a subspace computes its own gradients, and forms no tensor [V, d]. The
            # logits of a chunk are the largest tensor of a step, so chunks are small. On a GPU they
            # are larger: with 256 tokens the products take longer than reading the head, which
            # each chunk does.
            chunk_tokens = self.chunk_tokens or (128 if hidden.device.type == "cpu" else 256)
            return head.summed_cross_entropy(hidden, labels, chunk_tokens=chunk_tokens)
        if is_sharded(head.weight):
            return cross_entropy_through(head, hidden, labels, chunk_tokens=self.chunk_tokens)
        return chunked_cross_entropy(
            hidden,
            head.weight,
            labels,
            bias=head.bias,
            chunk_tokens=self.chunk_tokens,
            repeatable=self.repeatable,
        )

    @torch.no_grad()
    def is_exact_for(self, model: nn.Module, input_ids: Tensor) -> bool:
        """Whether the model's loss on `input_ids` [B, T] is the cross-entropy of `head(hidden)`."""
        causal_lm = unwrap_peft(model)
        head: Any = causal_lm.get_output_embeddings()
        plain = type(head) is nn.Linear or isinstance(head, SumsCrossEntropy)
        if not plain or head._forward_pre_hooks or head._forward_hooks:
            return False  # an adapter, a quantised weight or a hook: its output is not x Wᵀ
        was_training = model.training
        model.eval()
        try:
            own = causal_lm(input_ids=input_ids, labels=input_ids, use_cache=False)
            hidden = causal_lm.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
            # Amplified, because a soft cap hardly changes small logits, as random weights give.
            amplify = head.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 1024,))
            try:
                logits = causal_lm(input_ids=input_ids, use_cache=False).logits
            finally:
                amplify.remove()
        finally:
            model.train(was_training)
        plain_loss = cross_entropy(
            own.logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten()
        )
        adds_no_loss = torch.allclose(own.loss.float(), plain_loss, rtol=1e-5, atol=1e-6)
        tolerance = 1e-4 if hidden.dtype == torch.float32 else 2e-2
        scale = logits.abs().max().float()
        difference = (logits.float() - head(hidden * 1024).float()).abs().max()
        return adds_no_loss and bool(difference <= tolerance * scale)


def unwrap_peft(model: Any) -> Any:
    """Return the causal LM inside a `PeftModel`, or `model` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
