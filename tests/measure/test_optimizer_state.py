"""The state of an optimizer, in bytes: counted, and estimated before it is there."""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from lit_ft.measure import (
    estimate_state_bytes,
    optimizer_state_bytes,
    weight_bytes,
)
from lit_ft.optim import RowwiseAdamW8bit
from lit_ft.optim.rounded import stochastically_rounded
from lit_ft.tensors.row_blocks import row_blocks

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "adafactor": torch.optim.Adafactor,
    "adafactor_relative": transformers.Adafactor,
    "adamw_8bit": bnb.optim.AdamW8bit,
    "adamw_8bit_torchao": RowwiseAdamW8bit,
    "lion_8bit": bnb.optim.Lion8bit,
}


def two_layers() -> nn.Module:
    # 128 × 128: bitsandbytes keeps states of fewer than 4,096 values in 32 bits.
    return nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(2, 128)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_shared_quantile_maps_count_once():
    model = two_layers()
    optimizer = bnb.optim.AdamW8bit(model.parameters())
    step(model, optimizer)
    matrices, blocks, maps = 2 * 2 * 128 * 128, 2 * 2 * 64 * 4, 2 * 256 * 4
    biases = 2 * 2 * 128 * 4
    assert optimizer_state_bytes(optimizer) == matrices + blocks + maps + biases


@pytest.fixture
def two_ranks():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def test_of_a_sharded_parameter_the_local_part_counts(two_ranks):
    weight = nn.Parameter(distribute_tensor(torch.zeros(8, 4), two_ranks, [Shard(0)]))
    model = nn.Module()
    model.weight = weight
    optimizer = torch.optim.AdamW([weight])
    assert weight_bytes(model) == 4 * 4 * 4
    assert estimate_state_bytes(optimizer) == [2 * 4 * 4 * 4 + 4]
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert optimizer_state_bytes(optimizer) == 2 * 4 * 4 * 4 + 4


def test_the_estimate_of_a_sharded_8bit_state_is_local_too(two_ranks):
    weight = nn.Parameter(distribute_tensor(torch.zeros(256, 128), two_ranks, [Shard(0)]))
    local, blocks, maps = 2 * 128 * 128, 2 * 64 * 4, 2 * 256 * 4
    assert estimate_state_bytes(bnb.optim.AdamW8bit([weight])) == [local + blocks + maps]
    blocks, count = 2 * 128 * 4, 4  # one block a row; code books are shared by all optimizers
    optimizer = RowwiseAdamW8bit([weight])
    assert estimate_state_bytes(optimizer) == [local + blocks + count]
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert optimizer_state_bytes(optimizer) == local + blocks + count


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_estimate_equals_the_state_after_one_step(name):
    model = two_layers()
    optimizer = OPTIMIZERS[name](model.parameters())
    estimate = estimate_state_bytes(optimizer)
    assert not optimizer.state
    step(model, optimizer)
    assert estimate == [optimizer_state_bytes(optimizer)]


# Plain SGD keeps no state, and fails on meta when rounded: unknown, rightly.
@pytest.mark.parametrize("name", sorted(OPTIMIZERS.keys() - {"sgd"}))
def test_the_estimate_knows_the_float32_state_of_rounded_bfloat16_weights(name):
    model = two_layers().bfloat16()
    optimizer = stochastically_rounded(OPTIMIZERS[name](model.parameters()), seed=0)
    estimate = estimate_state_bytes(optimizer)
    model(torch.ones(2, 128).bfloat16()).sum().backward()
    optimizer.step()
    assert estimate == [optimizer_state_bytes(optimizer)]


def test_the_estimate_knows_what_is_stepped_in_pieces():
    weight = nn.Parameter(torch.empty(3000, 10_000, dtype=torch.bfloat16))
    assert len(row_blocks(weight.to("meta"))) > 1
    optimizer = stochastically_rounded(torch.optim.AdamW([weight]), seed=0)
    assert estimate_state_bytes(optimizer) == [weight.numel() * 8 + 4]


def test_the_estimate_is_by_group():
    model = two_layers()
    groups = [{"params": model[0].parameters()}, {"params": [model[1].bias]}]
    size = 2 * 4
    expected = [(128 * 128 + 128) * size + 2 * 4, 128 * size + 4]
    assert estimate_state_bytes(torch.optim.AdamW(groups)) == expected


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_estimating_leaves_no_trace_in_training(name):
    torch.manual_seed(0)
    untouched = two_layers()
    model = copy.deepcopy(untouched)
    fired = []
    for each, estimates in ((untouched, False), (model, True)):
        optimizer = OPTIMIZERS[name](each.parameters())
        if optimizer.param_groups[0]["lr"] is not None:  # a scheduler wraps optimizer.step
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        optimizer.register_step_post_hook(lambda *_: fired.append(1))
        for _ in range(2):
            if estimates:
                estimate_state_bytes(optimizer)
            step(each, optimizer)
    assert len(fired) == 4
    for ours, theirs in zip(model.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_an_optimizer_without_a_meta_step_is_unknown_not_zero():
    class Refuses(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("needs a real device")

    assert estimate_state_bytes(Refuses(two_layers().parameters(), lr=1.0)) == [None]
