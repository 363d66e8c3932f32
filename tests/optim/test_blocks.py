"""Blocks in turns: their order, what moves, what has a gradient and a state, and what rounds."""

from __future__ import annotations

import copy
from functools import partial

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import SGD, AdamW

from lit_ft.compat.refusal import Refusal
from lit_ft.measure.memory import state_tensors
from lit_ft.optim import Apollo, MuonAdamW, RowwiseAdamW8bit, SinkGD, stochastically_rounded
from lit_ft.optim.blocks import ORDERS, BlockOrder, BlockTurns, largest_blocks, usual_stay
from lit_ft.optim.model_blocks import model_blocks
from tests.support.tiny_model import tiny_model

LLAMA = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 40, "num_hidden_layers": 3}


def llama(**sizes):
    return tiny_model("llama", **{**LLAMA, **sizes}).eval()


def loss_of(model, seed):
    ids = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(seed))
    return model(input_ids=ids, labels=ids).loss


@given(
    num_blocks=st.integers(2, 20),
    every=st.integers(1, 5),
    active=st.integers(1, 6),
    order=st.sampled_from(ORDERS),
    seed=st.integers(0, 99),
)
def test_in_each_cycle_each_block_is_active_for_one_stay(num_blocks, every, active, order, seed):
    turns = BlockOrder(num_blocks, every, active, order, seed)
    cycle = turns.stays * every
    for start in (0, cycle, 2 * cycle):
        stays = [turns.at(start + step) for step in range(cycle)]
        for stay in range(0, cycle, every):
            assert len(set(stays[stay : stay + every])) == 1
        seen = [block for _, blocks in stays[::every] for block in blocks]
        assert sorted(seen) == list(range(num_blocks))
        assert all(len(blocks) <= active for _, blocks in stays)
        if order != "random":
            assert seen == sorted(seen, reverse=order == "descending")


def test_a_random_order_differs_from_cycle_to_cycle_and_by_seed():
    turns = BlockOrder(12, 1)
    cycles = [tuple(turns.at(step)[1][0] for step in range(s, s + 12)) for s in (0, 12, 24)]
    assert len(set(cycles)) == 3
    assert turns.at(5) == BlockOrder(12, 1).at(5)
    assert [turns.at(s)[1] for s in range(12)] != [
        BlockOrder(12, 1, seed=1).at(s)[1] for s in range(12)
    ]


@pytest.mark.parametrize(
    ("steps", "stays", "stay"),
    [
        (40, 31, 1),
        (40, 3, 13),
        (3100, 31, 100),
        (10, 31, 1),
        (1e6, 31, 100),
        (float("inf"), 9, 100),
    ],
)
def test_a_stay_divides_the_run_and_is_not_too_long(steps, stays, stay):
    assert usual_stay(steps, stays) == stay


OPTIMIZERS = {
    "adamw": partial(AdamW, lr=1e-2, weight_decay=0.5),
    "adamw_fused": partial(AdamW, lr=1e-2, weight_decay=0.5, fused=True),
    "sgd": partial(SGD, lr=1e-2, momentum=0.9, weight_decay=0.5),
    "adamw_8bit": partial(bnb.optim.AdamW8bit, lr=1e-2, weight_decay=0.5),
    "rowwise": partial(RowwiseAdamW8bit, lr=1e-2),
}


@pytest.mark.parametrize("drop_state", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_active_blocks_alone_move_and_have_gradients_and_state(name, drop_state):
    model = llama()
    optimizer = OPTIMIZERS[name](model.parameters())
    blocks = model_blocks(model).blocks
    turns = BlockTurns(optimizer, blocks, BlockOrder(len(blocks), 2), drop_state=drop_state)
    seen: set[str] = set()
    for step in range(2 * len(blocks)):
        before = copy.deepcopy(model.state_dict())
        assert turns.begin_step(step) is (step % 2 == 0)
        [active] = turns.active
        seen.add(active)
        loss_of(model, step).backward()
        assert {p for p in model.parameters() if p.grad is not None} == set(blocks[active])
        optimizer.step()
        optimizer.zero_grad()
        moved = {n for n, v in model.state_dict().items() if not v.equal(before[n])}
        mine = {n for n, p in model.named_parameters() if p in set(blocks[active])}
        assert moved - {"lm_head.weight"} == mine - {"lm_head.weight"}
        expected = [active] if drop_state else seen
        assert set(optimizer.state) == {p for each in expected for p in blocks[each]}
    assert len(seen) == len(blocks)
    turns.release()
    assert all(p.requires_grad for p in model.parameters())


def test_state_takes_the_bytes_of_the_active_blocks():
    model = llama()
    optimizer = AdamW(model.parameters())
    blocks = model_blocks(model).blocks
    turns = BlockTurns(optimizer, blocks, BlockOrder(len(blocks), 1, active=2))
    for step in range(4):
        turns.begin_step(step)
        loss_of(model, step).backward()
        optimizer.step()
        held = sum(t.nbytes for t in state_tensors(dict(optimizer.state)))
        active = [p for name in turns.active for p in blocks[name]]
        assert held == sum(2 * p.nbytes + 4 for p in active)  # both moments, and a step count


def test_the_graph_ends_below_the_lowest_active_block():
    model = llama(tie_word_embeddings=False)
    blocks = model_blocks(model).blocks
    turns = BlockTurns(
        AdamW(model.parameters()), blocks, BlockOrder(len(blocks), 1, order="descending")
    )
    inputs = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].requires_grad))
    for step, expected in enumerate([[0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 1, 1], [1, 1, 1]]):
        inputs.clear()
        turns.begin_step(step)
        loss_of(model, step).backward()
        assert inputs == expected


def test_a_gradient_of_an_earlier_stay_is_let_go():
    model = llama()
    optimizer = AdamW(model.parameters())
    blocks = model_blocks(model).blocks
    turns = BlockTurns(optimizer, blocks, BlockOrder(len(blocks), 1))
    for step in range(2):
        turns.begin_step(step)
        loss_of(model, step).backward()  # as Lightning does, nothing is zeroed after the step
        optimizer.step()
        assert {p for p in model.parameters() if p.grad is not None} == set(blocks[turns.active[0]])


@pytest.mark.parametrize("drop_state", [True, False])
@pytest.mark.parametrize("at", [3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loop_that_stops_goes_on_bit_for_bit(dtype, at, drop_state):
    def made():
        model = llama().to(dtype)
        optimizer = stochastically_rounded(AdamW(model.parameters(), lr=1e-2), seed=0)
        blocks = model_blocks(model).blocks
        order = BlockOrder(len(blocks), 2)
        return model, optimizer, BlockTurns(optimizer, blocks, order, drop_state=drop_state)

    def train(parts, steps):
        model, optimizer, turns = parts
        for step in steps:
            turns.begin_step(step)
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        return parts

    whole = train(made(), range(10))
    first = train(made(), range(at))
    resumed = made()
    for part, saved in zip(resumed, first, strict=True):
        part.load_state_dict(copy.deepcopy(saved.state_dict()))
    train(resumed, range(at, 10))
    for name, value in whole[0].state_dict().items():
        assert value.equal(resumed[0].state_dict()[name]), name


def test_rounding_draws_other_bits_in_each_stay():
    def rounded(stays):
        parameter = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = stochastically_rounded(SGD([parameter], lr=2.0**-10), seed=0)
        order = BlockOrder(1, 1)
        turns = BlockTurns(optimizer, {"one": [parameter]}, order)
        for step in stays:
            turns.begin_step(step)
            parameter.data.fill_(1)
            parameter.grad = -torch.ones_like(parameter)
            optimizer.step()
        return parameter.detach().clone()

    first, second = rounded([0]), rounded([0, 1])
    assert not first.equal(second)
    assert rounded([0, 1]).equal(second)
    assert 0 < (first > 1).float().mean() < 0.5


@pytest.mark.parametrize(
    "build",
    [
        lambda model: Apollo(model.parameters(), lr=1e-3, rank=2),
        lambda model: SinkGD(model.parameters(), lr=1e-3),
        lambda model: MuonAdamW(
            [
                {"params": list(model.model.layers[i].mlp.parameters()), "use_muon": True}
                for i in range(3)
            ]
            + [{"params": [p for n, p in model.named_parameters() if "mlp" not in n]}],
            lr=1e-3,
        ),
    ],
    ids=["apollo", "sinkgd", "muon"],
)
def test_other_optimizers_take_turns_too(build):
    model = llama()
    optimizer = build(model)
    blocks = model_blocks(model).blocks
    turns = BlockTurns(optimizer, blocks, BlockOrder(len(blocks), 1))
    for step in range(2 * len(blocks)):
        before = copy.deepcopy(model.state_dict())
        turns.begin_step(step)
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        mine = set(blocks[turns.active[0]])
        for name, parameter in model.named_parameters():
            assert parameter.equal(before[name]) is (parameter not in mine), name


def test_what_cannot_take_turns_is_refused_with_a_way_out():
    model = llama()
    blocks = model_blocks(model).blocks
    order = BlockOrder(len(blocks), 1)
    with pytest.raises(Refusal, match="not the others: LBFGS"):
        BlockTurns(torch.optim.LBFGS(model.parameters()), blocks, order)
    paged = bnb.optim.PagedAdamW8bit(model.parameters())
    with pytest.raises(Refusal, match=r'cannot be freed: paged.*BlockUpdate\(state="keep"\)'):
        BlockTurns(paged, blocks, order)
    BlockTurns(paged, blocks, order, drop_state=False)
    with pytest.raises(ValueError, match="does not hold all parameters of block 'embeddings'"):
        BlockTurns(AdamW(model.model.layers.parameters()), blocks, order)


def test_the_largest_blocks_are_those_of_the_most_bytes_the_first_of_equals():
    model = llama(tie_word_embeddings=False)
    blocks = model_blocks(model).blocks
    assert largest_blocks(blocks, 1) == ("model.layers.0",)
    assert largest_blocks(blocks, 2) == ("model.layers.0", "model.layers.1")
