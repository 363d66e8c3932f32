"""bfloat16 weights at a small learning rate: what stochastic rounding saves."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.optim import AdamW

from lit_ft.loss.chunked import ChunkedCrossEntropy
from lit_ft.optim import build_optimizer, stochastically_rounded
from lit_ft.optim import rounded as rounding
from lit_ft.subspace import SubspaceUpdater, inject
from lit_ft.subspace.layers import base as layer
from lit_ft.subspace.projectors import Oja
from tests.support.tiny_model import tiny_model

LR, STEPS = 2e-5, 300


def fall_in_loss(dtype: torch.dtype, every: int = 1) -> float:
    """Train from weights on bfloat16's grid; the loss before and after is taken in float32."""
    generator = torch.Generator().manual_seed(1)
    batches = torch.randint(3, 60, (8, 4, 16), generator=generator)
    sizes = {"tie_word_embeddings": True, "num_hidden_layers": 1}
    model = tiny_model("llama", **sizes).bfloat16().to(dtype)
    reader = tiny_model("llama", **sizes)

    def loss_now() -> float:
        reader.load_state_dict(model.state_dict(), strict=False)  # the small tensors are left out
        with torch.no_grad():
            losses = [ChunkedCrossEntropy()(reader, {"input_ids": ids}, ids) for ids in batches]
        return sum(losses).item() / batches[:, :, 1:].numel()

    layers = inject(model, rank=16)
    optimizer = build_optimizer(partial(AdamW, lr=LR), model.named_parameters())
    SubspaceUpdater(layers, Oja(every=every)).attach(stochastically_rounded(optimizer, seed=0))
    before = loss_now()
    for step in range(STEPS):
        ids = batches[step % len(batches)]
        (ChunkedCrossEntropy()(model, {"input_ids": ids}, ids) / ids[:, 1:].numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return before - loss_now()


@pytest.fixture(scope="module")
def in_float32() -> float:
    fall = fall_in_loss(torch.float32)
    assert fall > 0.1
    return fall


def test_stochastic_rounding_keeps_float32s_fall(in_float32: float) -> None:
    # Each move adds the noise of its rounding, so a basis that moves at each step loses 3 %.
    assert fall_in_loss(torch.bfloat16) >= 0.96 * in_float32
    assert fall_in_loss(torch.bfloat16, every=4) >= 0.98 * fall_in_loss(torch.float32, every=4)


def test_rounding_to_nearest_would_lose_it(in_float32: float, monkeypatch) -> None:
    def to_nearest(x: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
        return x.bfloat16()

    monkeypatch.setattr(
        layer, "round_moved", lambda weight, step, bits, keep: (keep * weight + step).bfloat16()
    )
    monkeypatch.setattr(rounding, "round_stochastically", to_nearest)
    assert fall_in_loss(torch.bfloat16) < 0.5 * in_float32
