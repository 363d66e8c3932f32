"""The moments follow a change of basis: a permutation of the coordinates shows the rule exactly."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, RMSprop
from torchao.optim import AdamW8bit
from transformers.optimization import Adafactor

from lit_ft.optim import RowwiseAdamW8bit
from lit_ft.subspace.moments import rotate_moments

ROWS, RANK = 16, 32


def turn(optimizer, weight, rotation):
    name = getattr(optimizer, "optimizer_name", "")
    state, [group] = optimizer.state[weight], optimizer.param_groups
    return rotate_moments(state, group, rotation, name=name)


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
