"""The moments follow a change of basis: a permutation of the coordinates shows the rule exactly."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, RMSprop
from torchao.optim import AdamW8bit
from transformers.optimization import Adafactor

from lit_ft.compat.optimizers import traits_of
from lit_ft.optim import RowwiseAdamW8bit
from lit_ft.subspace.moments import change_of_basis, rotate_moments

ROWS, RANK = 16, 32


def turn(optimizer, weight, rotation):
    state, [group] = optimizer.state[weight], optimizer.param_groups
    return rotate_moments(state, group, rotation, moments=traits_of(type(optimizer)).moments)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (AdamW, {}),
        (SGD, {"momentum": 0.9}),
        (RowwiseAdamW8bit, {}),
        (Adafactor, {"scale_parameter": False, "relative_step": False, "beta1": 0.9}),
        (bnb.optim.AdamW, {}),
        (bnb.optim.Lion, {}),
        (bnb.optim.SGD, {"momentum": 0.9}),
        (bnb.optim.RMSprop, {"momentum": 0.0}),
        (bnb.optim.Adagrad, {}),
    ],
)
def test_permuted_coordinates_step_to_the_permuted_parameter(kind, options):
    """As if the coordinates, which change places between two steps, had been so from the start."""
    torch.manual_seed(0)
    gradients = torch.randn(6, ROWS, RANK)
    permutation = torch.randperm(RANK)
    rotation = torch.eye(RANK)[:, permutation]
    changing, throughout = (nn.Parameter(torch.zeros(ROWS, RANK)) for _ in range(2))
    optimizers = [kind([weight], lr=1e-2, **options) for weight in (changing, throughout)]
    for step, gradient in enumerate(gradients):
        if step == 3:
            assert turn(optimizers[0], changing, rotation)
            changing.data = changing.data @ rotation
        changing.grad = gradient @ rotation if step >= 3 else gradient
        throughout.grad = gradient @ rotation
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(changing, throughout, rtol=1e-5, atol=1e-6)


def test_squares_stay_squares():
    weight = nn.Parameter(torch.zeros(ROWS, RANK))
    optimizer = bnb.optim.RMSprop([weight], lr=1e-2)
    weight.grad = torch.randn(ROWS, RANK)
    optimizer.step()
    assert turn(optimizer, weight, torch.linalg.qr(torch.randn(RANK, RANK)).Q)
    assert (optimizer.state[weight]["state1"] >= 0).all()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (AdamW, {}),
        (Adafactor, {"scale_parameter": False, "relative_step": False}),
        (bnb.optim.AdamW, {}),
        (bnb.optim.RMSprop, {"momentum": 0.0}),
    ],
)
@pytest.mark.parametrize("every", [1, 10])
def test_steps_keep_their_size_while_bases_come_and_go(kind, options, every):
    """Noise is as large in one direction as in another, and so are the steps that it makes."""
    torch.manual_seed(0)
    width, sizes = 8 * RANK, {}
    for moves in (False, True):
        weight = nn.Parameter(torch.zeros(ROWS, RANK))
        optimizer = kind([weight], lr=1.0, weight_decay=0.0, **options)
        basis, steps = basis_of(width), []
        for step in range(100):
            weight.grad = torch.randn(ROWS, width) @ basis.T
            before = weight.detach().clone()
            optimizer.step()
            steps.append((weight.detach() - before).square().mean())
            if moves and step % every == 0:
                basis, old = basis_of(width), basis
                assert turn(optimizer, weight, change_of_basis(old, basis))
        sizes[moves] = torch.stack(steps[20:]).mean().sqrt()
    # Momentum that the new basis cannot express is lost: somewhat smaller they may be.
    assert 0.4 < sizes[True] / sizes[False] < 1.1


def basis_of(width):
    return torch.linalg.qr(torch.randn(width, RANK)).Q.T


def values(state):
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    return {
        key: value.dequantize() if "8bit" in type(value).__name__ else value.clone()
        for key, value in tensors.items()
    }


@pytest.mark.parametrize(
    "build",
    [
        lambda weights: AdamW(weights, amsgrad=True),
        torch.optim.Adamax,
        RMSprop,
        lambda weights: RMSprop(weights, momentum=0.9, centered=True),
        bnb.optim.AdEMAMix,
        AdamW8bit,
    ],
)
def test_a_state_without_a_rule_is_left_as_it_is(build):
    weight = nn.Parameter(torch.zeros(64, 64))
    optimizer = build([weight])
    weight.grad = torch.randn(64, 64)
    if build is AdamW8bit:  # whose step needs a compiler
        state = optimizer.state[weight]
        state["step"] = torch.tensor(1.0)
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            state[name] = optimizer._subclass_zeros(weight.detach(), signed, 64)
    else:
        optimizer.step()
    before = values(optimizer.state[weight])
    assert not turn(optimizer, weight, torch.eye(64).flip(0))
    after = values(optimizer.state[weight])
    assert all(torch.equal(value, before[key]) for key, value in after.items())


def test_an_empty_state_needs_no_rule():
    weight = nn.Parameter(torch.zeros(ROWS, RANK))
    assert turn(SGD([weight], lr=1.0), weight, torch.eye(RANK))


@pytest.mark.parametrize(
    ("eight_bit", "wide", "names"),
    [
        (bnb.optim.AdamW8bit, bnb.optim.AdamW, ("state1", "state2")),
        (RowwiseAdamW8bit, AdamW, ("exp_avg", "exp_avg_sq")),
    ],
)
def test_eight_bit_moments_turn_as_their_values_do(eight_bit, wide, names):
    from lit_ft.subspace.moments import _read, rotate_moments

    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(512, 64))
    states = []
    for kind in (eight_bit, wide):
        optimizer = kind([weight], lr=1e-3)
        for seed in range(3):
            weight.grad = torch.randn(512, 64, generator=torch.Generator().manual_seed(seed))
            optimizer.step()
        states.append(optimizer.state[weight])
        rotation = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(9)))
        moments = traits_of(kind).moments
        assert rotate_moments(states[-1], optimizer.param_groups[0], rotation.Q, moments=moments)
    for name in names:
        quantised, exact = _read(states[0], name), states[1][name]
        assert states[0][name].dtype == torch.uint8
        cosine = torch.cosine_similarity(quantised.flatten(), exact.flatten(), dim=0)
        assert cosine > 0.99


def test_a_rank_without_rows_has_moments_to_turn() -> None:
    state = {"step": torch.tensor(1.0)}
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = torch.empty(0, 64, dtype=torch.uint8)
        state[f"{name}_scale"] = torch.empty(0, 1)
    moments = traits_of(RowwiseAdamW8bit).moments
    assert rotate_moments(state, {"betas": (0.9, 0.999)}, torch.eye(64), moments=moments)
