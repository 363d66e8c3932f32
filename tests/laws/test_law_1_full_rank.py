"""Law 1: at full rank, with the identity as basis, subspace training is plain AdamW."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from lit_ft.subspace import basis_tracker as bases
from tests.support.subspace_run import NEVER, Run


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
