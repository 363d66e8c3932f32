"""Law 1: at full rank, with the identity as basis, subspace training is plain AdamW."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from lit_ft.loss import ChunkedCrossEntropy
from lit_ft.subspace import basis_tracker as bases
from tests.support.subspace_run import NEVER, Run, batches
from tests.support.tiny_model import tiny_model


@pytest.mark.parametrize("side", ["right", "left"])
def test_full_rank_with_the_identity_as_basis_is_plain_adamw(side, monkeypatch):
    """Law 1."""
    monkeypatch.setattr(bases, "_START_ROUNDS", 0)
    linear = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()
    plain = copy.deepcopy(linear)
    options = {"lr": 1e-2, "weight_decay": 0.1}
    run = Run(NEVER, rank=6, model=linear, side=side, **options)
    for layer in run.steps.layers.values():
        layer.basis.data.copy_(torch.eye(6))
    optimizer = AdamW(plain.parameters(), **options)
    for seed in range(10):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed)).double()
        for model, stepped in ((linear, run.optimizer), (plain, optimizer)):
            model(x).square().sum().backward()
            stepped.step()
            stepped.zero_grad()
    others = dict(plain.named_parameters())
    for name, weight in run.weights.items():
        torch.testing.assert_close(weight, others[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("optimizer", [AdamW, SGD])
def test_a_scaled_embedding_that_is_tied_to_the_head_is_no_exception(optimizer, monkeypatch):
    """Law 1, for Gemma 3, whose norms compute in float32."""
    monkeypatch.setattr(bases, "_START_ROUNDS", 0)
    gemma = tiny_model("gemma3_text", head_dim=16).double().eval()
    plain = copy.deepcopy(gemma)
    run = Run(NEVER, rank=64, model=gemma, optimizer=optimizer, scale=1.0, lr=1e-2)
    for layer in run.steps.layers.values():
        layer.basis.data.copy_(torch.eye(layer.rank))
    stepped = optimizer(plain.parameters(), lr=1e-2)
    before = copy.deepcopy(plain.state_dict())
    for ids, labels in batches(5):
        run.step(ids, labels)
        loss = ChunkedCrossEntropy(chunk_tokens=64)(plain, {"input_ids": ids}, labels)
        (loss / (labels[:, 1:] != -100).sum()).backward()
        stepped.step()
        stepped.zero_grad()
    others = dict(plain.named_parameters())
    assert not torch.equal(before["model.embed_tokens.weight"], others["model.embed_tokens.weight"])
    for name, weight in run.weights.items():
        torch.testing.assert_close(weight, others[name], rtol=1e-8, atol=1e-8, msg=name)
