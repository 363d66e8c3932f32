"""Optimizers on parameters of which each rank holds rows: what one rank does, uneven parts too."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim import Optimizer

from lit_ft.compat.optimizers import traits_of
from lit_ft.optim import Apollo, RowwiseAdamW8bit, Scale, SinkGD, narrowed, stochastically_rounded
from lit_ft.optim.adafactor import Adafactor, RelativeStepAdafactor
from lit_ft.subspace.moments import rotate_moments
from lit_ft.tensors.sharding import full_tensor
from tests.support.ranks import WORLD

pytestmark = pytest.mark.slow

STEPS = 4
# Odd numbers of rows; one row, of which the second rank has none; a stack of matrices; vectors.
SHAPES = [(37, 24), (1, 4096), (5, 30, 32), (9,), (1,), (301, 64), (8, 5)]
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adafactor": partial(RelativeStepAdafactor, relative_size=0.1, weight_decay=0.1),
    "adafactor_momentum": partial(
        Adafactor, lr=1e-2, beta1=0.9, relative_step=False, scale_parameter=False
    ),
    "adamw_8bit": partial(RowwiseAdamW8bit, lr=1e-2),
    "scale": partial(Scale, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "scale_columns": partial(Scale, lr=1e-2, momentum=0.9, dim=-2),
    "apollo": partial(Apollo, lr=1e-2, rank=8, refresh_every=2, weight_decay=0.1),
    "apollo_mini": partial(Apollo, lr=1e-2, rank=1, scale=11.3, per="tensor"),
    "sinkgd": partial(SinkGD, lr=1e-2, scale=0.5, weight_decay=0.1),
}
MATRICES = sum(len(shape) == 2 for shape in SHAPES)
# Messages of a step of all parameters, and of steps one by one, where the number differs from one
# message for what is stepped.
MESSAGES = {
    "adamw_8bit": (0, 0),
    "apollo": (2, 6),  # a wide matrix; all norms, that of the stack too
    "apollo_mini": (3, 9),  # tall matrices are seen in parts, too
    "scale": (0, 0),
    "scale_columns": (1, MATRICES),
    "sinkgd": (5, 5 * MATRICES),
}


def build(name: str, dtype: torch.dtype, sharded: bool) -> tuple[list[Tensor], Any]:
    spread: Any = partial(torch.clone)
    if sharded:
        mesh = init_device_mesh("cpu", (WORLD,))
        spread = partial(distribute_tensor, device_mesh=mesh, placements=[Shard(0)])

    def random(shape: tuple[int, ...], seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return spread(torch.randn(shape, generator=generator).to(dtype))

    weights = [nn.Parameter(random(shape, 0)) for shape in SHAPES]
    return weights, random


def train(
    name: str, dtype: torch.dtype, *, sharded: bool, one_by_one: bool = False, steps: int = STEPS
) -> tuple[list[Tensor], list[dict[str, Any]], int]:
    """Return the whole weights, their whole state, and the messages that a rank has sent."""
    weights, random = build(name, dtype, sharded)
    optimizer = stochastically_rounded(OPTIMIZERS[name](weights), seed=0)
    with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as messages:
        for step in range(steps):
            for weight in weights:
                weight.grad = random(tuple(weight.shape), step + 1)
            if one_by_one:
                for weight in reversed(weights):
                    with narrowed(optimizer, weight):
                        optimizer.step()
            else:
                optimizer.step()
    states = [
        {k: full_tensor(v) if isinstance(v, Tensor) else v for k, v in optimizer.state[w].items()}
        for w in weights
    ]
    return [full_tensor(weight).clone() for weight in weights], states, messages.call_count


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ranks_step_their_rows_as_one_rank_does(
    name: str, one_by_one: bool, on_both: Callable[..., list[Any]]
) -> None:
    eight_bit = name == "adamw_8bit"
    dtype = torch.float32 if eight_bit else torch.float64
    expected = train(name, dtype, sharded=False)[:2]
    first, second = on_both(train, name, dtype, sharded=True, one_by_one=one_by_one)
    tolerance = {"rtol": 0, "atol": 0} if eight_bit else {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(first[:2], expected, **tolerance)
    torch.testing.assert_close(second[:2], first[:2], rtol=0, atol=0)
    messages = STEPS * MESSAGES.get(name, (1, len(SHAPES)))[one_by_one]
    assert first[2] == second[2] == messages


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bfloat16_rows_are_stepped_in_float32_and_rounded(
    name: str, on_both: Callable[..., list[Any]]
) -> None:
    weights, states, _ = train(name, torch.bfloat16, sharded=False, steps=1)
    for theirs, their_states, _ in on_both(train, name, torch.bfloat16, sharded=True, steps=1):
        torch.testing.assert_close(their_states, states, rtol=1e-5, atol=1e-7)
        # The bits that round a weight are others: it goes to the other neighbour at most.
        torch.testing.assert_close(theirs, weights, rtol=2**-7, atol=1e-30)


def turn(name: str, sharded: bool) -> dict[str, Any]:
    """Step a matrix, turn its moments, and return them whole."""
    weights, random = build(name, torch.float32, sharded)
    weight = weights[SHAPES.index((301, 64))]
    optimizer = OPTIMIZERS[name]([weight])
    weight.grad = random((301, 64), 1)
    optimizer.step()
    rotation = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(2))).Q
    moments = traits_of(type(optimizer)).moments
    [group] = optimizer.param_groups
    assert rotate_moments(optimizer.state[weight], group, rotation, moments=moments)
    return {k: full_tensor(v) for k, v in optimizer.state[weight].items() if isinstance(v, Tensor)}


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "apollo" not in name])
def test_moments_turn_with_a_basis_as_on_one_rank(
    name: str, on_both: Callable[..., list[Any]]
) -> None:
    expected = turn(name, sharded=False)
    first, second = on_both(turn, name, sharded=True)
    for key, value in expected.items():
        assert first[key].equal(second[key])
        if value.dtype is torch.uint8:  # a product of fewer rows may round another way
            assert (first[key].int() - value.int()).abs().max() <= 1
        else:
            torch.testing.assert_close(first[key], value, rtol=1e-5, atol=1e-7)


def by_columns(name: str) -> str:
    mesh = init_device_mesh("cpu", (WORLD,))
    weight = nn.Parameter(distribute_tensor(torch.ones(64, 96), mesh, [Shard(1)]))
    optimizer = OPTIMIZERS[name]([weight])
    weight.grad = torch.ones_like(weight)
    try:
        optimizer.step()
    except ValueError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_shared_by_columns_are_refused(
    name: str, on_both: Callable[..., list[Any]]
) -> None:
    for message in on_both(by_columns, name):
        assert "by columns" in message
