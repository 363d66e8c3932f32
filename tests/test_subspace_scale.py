"""α: a learning rate means for the small parameter what it means for the weight."""

from __future__ import annotations

from functools import partial

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Muon

from lit_ft.subspace import SubspaceStep, inject
from lit_ft.subspace.projectors import SubspaceIteration

SHAPES = [(48, 48), (96, 24), (24, 96)]


def step(optimizer, shape, side, gradient, rank=None):
    """Return what one step takes the weight by, and the basis if it is one in a subspace."""
    layer = nn.Linear(shape[1], shape[0], bias=False)
    model = nn.Sequential(layer)
    before, basis = layer.weight.detach().clone(), None
    if rank is not None:
        layers = inject(model, rank=rank, side=side)
        basis = next(iter(layers.values())).basis.detach().clone()
    built = optimizer([p for p in model.parameters() if p.requires_grad], weight_decay=0.0)
    if rank is not None:
        SubspaceStep(layers, SubspaceIteration(every=10**6)).attach(built)
    # The loss <G, W>, whose gradient is G.
    (model(torch.eye(shape[1])) * gradient.T).sum().backward()
    built.step()
    return layer.weight.detach() - before, basis


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "optimizer", [partial(SGD, lr=0.1), partial(bnb.optim.SGD, lr=0.1, momentum=0.9)]
)
def test_a_step_of_sgd_is_its_step_on_the_weight_projected(optimizer, shape, side):
    torch.manual_seed(0)
    gradient = torch.randn(shape)
    whole, _ = step(optimizer, shape, side, gradient)
    update, basis = step(optimizer, shape, side, gradient, rank=8)
    projection = basis.T @ basis
    expected = whole @ projection if side == "right" else projection @ whole
    torch.testing.assert_close(update, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_of_muon_keeps_its_spectral_norm(shape, side):
    torch.manual_seed(0)
    gradient = torch.randn(shape)
    optimizer = partial(Muon, lr=0.1)
    whole, _ = step(optimizer, shape, side, gradient)
    update, _ = step(optimizer, shape, side, gradient, rank=8)
    # Five Newton-Schulz steps bring singular values to 0.7..1.3.
    ratio = torch.linalg.matrix_norm(update, 2) / torch.linalg.matrix_norm(whole, 2)
    assert 0.5 < ratio < 2


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "optimizer", [partial(AdamW, lr=0.1), partial(Muon, lr=0.1, adjust_lr_fn="match_rms_adamw")]
)
def test_a_step_of_adamws_size_keeps_its_root_mean_square(optimizer, shape, side):
    torch.manual_seed(0)
    gradient = torch.randn(shape)
    whole, _ = step(optimizer, shape, side, gradient)
    update, _ = step(optimizer, shape, side, gradient, rank=8)
    assert 0.6 < update.square().mean().sqrt() / whole.square().mean().sqrt() < 1.5
