"""α: a learning rate means for the small parameter what it means for the weight."""

from __future__ import annotations

from functools import partial

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Muon

from lit_ft.callbacks import GaLore
from lit_ft.subspace import SubspaceUpdater, inject
from lit_ft.subspace.projectors import Oja, SubspaceIteration
from lit_ft.subspace.scale import matching_scale

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
        SubspaceUpdater(layers, SubspaceIteration(every=10**6)).attach(built)
    # The loss <G, W>, whose gradient is G.
    (model(torch.eye(shape[1])) * gradient.T).sum().backward()
    built.step()
    return layer.weight.detach() - before, basis


@pytest.mark.parametrize("side", ["right", "left", "std"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_rank_that_fills_a_layers_shorter_side_loses_nothing(shape, side):
    gradient = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    for rank in (min(shape), 128):
        moved, basis = step(partial(SGD, lr=0.1), shape, side, gradient, rank=rank)
        torch.testing.assert_close(moved, -0.1 * gradient, rtol=1e-4, atol=1e-5)
        assert basis.shape == (min(shape), min(shape))


@pytest.mark.parametrize("head_first", [True, False])
def test_what_is_tied_to_an_embedding_moves_as_it_does(head_first):
    head, tokens = nn.Linear(8, 20, bias=False), nn.Embedding(20, 8)
    head.weight = tokens.weight
    model = nn.ModuleList([head, tokens] if head_first else [tokens, head])
    [layer] = inject(model, rank=2).values()
    optimizer = AdamW([layer.delta])
    assert matching_scale(layer, optimizer, optimizer.param_groups[0]) == 1


@pytest.mark.parametrize("scale", ["paper", None, 0, -1.0, float("nan"), float("inf"), True])
def test_what_is_no_scale_is_refused(scale):
    with pytest.raises(ValueError, match=f"scale={scale}: give a positive number"):
        GaLore(scale=scale)
    with pytest.raises(ValueError, match=f"scale={scale}: give a positive number"):
        SubspaceUpdater(inject(nn.Sequential(nn.Linear(4, 4)), rank=2), Oja(), scale=scale)


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
