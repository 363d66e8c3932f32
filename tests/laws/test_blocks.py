"""Block updates are a plain loop that trains the active blocks with a fresh optimizer per turn."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from lit_ft.optim.blocks import ORDERS, BlockOrder, BlockTurns
from lit_ft.optim.model_blocks import model_blocks
from tests.support.tiny_model import tiny_model

STEPS = 14
OPTIONS = {"lr": 1e-2, "weight_decay": 0.1}
OUTER = {"embeddings": ("embed_tokens",), "head": ("model.norm", "lm_head")}


def model_of():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 40, "num_hidden_layers": 3}
    return tiny_model("llama", **sizes, tie_word_embeddings=False).double().eval()


def loss_of(model, seed):
    ids = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(seed))
    return model(input_ids=ids, labels=ids).loss


def in_turns(every, active, order, micro_batches, clip, always):
    """Train with `BlockTurns`; return the weights, and the names of the active blocks by step."""
    model = model_of()
    optimizer = AdamW(model.parameters(), **OPTIONS)
    found = model_blocks(model, always)
    turns = BlockTurns(optimizer, found.blocks, BlockOrder(len(found.blocks), every, active, order))
    seen = []
    for step in range(STEPS):
        turns.begin_step(step)
        seen.append(turns.active)
        for micro_batch in range(micro_batches):
            (loss_of(model, 10 * step + micro_batch) / micro_batches).backward()
        if clip is not None:
            clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict(), seen


def by_hand(seen, every, micro_batches, clip, always):
    """Train the named blocks alone, each turn with an AdamW that knows nothing of the others."""
    model = model_of()

    def members(block):
        wanted = OUTER.get(block, (f"{block}.",))
        return [p for n, p in model.named_parameters() if any(part in n for part in wanted)]

    always_on = [p for block in always for p in members(block)]
    lasting = AdamW(always_on, **OPTIONS) if always_on else None
    for step, blocks in enumerate(seen):
        mine = [p for block in blocks for p in members(block)]
        if step % every == 0:
            optimizer = AdamW(mine, **OPTIONS)
        together = [*mine, *always_on]
        losses = [loss_of(model, 10 * step + micro) for micro in range(micro_batches)]
        gradients = torch.autograd.grad(sum(losses) / micro_batches, together)
        for parameter, gradient in zip(together, gradients, strict=True):
            parameter.grad = gradient
        if clip is not None:
            clip_grad_norm_(together, clip)
        optimizer.step()
        if lasting is not None:
            lasting.step()
        model.zero_grad()
    return model.state_dict()


@settings(max_examples=12)
@given(
    every=st.integers(1, 5),
    active=st.integers(1, 3),
    order=st.sampled_from(ORDERS),
    micro_batches=st.integers(1, 2),
    clip=st.sampled_from([None, 0.05]),
    always=st.sampled_from([(), ("embeddings", "head")]),
)
@example(every=4, active=1, order="random", micro_batches=2, clip=0.05, always=())
@example(every=2, active=1, order="descending", micro_batches=1, clip=None, always=("head",))
def test_it_is_a_loop_with_a_fresh_optimizer_per_turn(
    every, active, order, micro_batches, clip, always
):
    if active >= 5 - len(always):
        return
    options = (micro_batches, clip, always)
    ours, seen = in_turns(every, active, order, *options)
    theirs = by_hand(seen, every, *options)
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize(("order", "first"), [("ascending", "embeddings"), ("descending", "head")])
def test_an_order_begins_at_its_end_of_the_model(order, first):
    _, seen = in_turns(2, 1, order, 1, None, ())
    assert seen[0] == seen[1] == (first,)
    blocks = ["embeddings", *(f"model.layers.{i}" for i in range(3)), "head"]
    expected = blocks if order == "ascending" else blocks[::-1]
    assert [name for (name,) in seen[::2]] == [*expected, *expected[:2]]


def test_kept_state_goes_on_where_it_was():
    """With `drop_state=False`, each block's steps are those of an optimizer of its own."""
    model = model_of()
    reference = copy.deepcopy(model)
    blocks = model_blocks(model).blocks
    optimizer = AdamW(model.parameters(), **OPTIONS)
    turns = BlockTurns(optimizer, blocks, BlockOrder(len(blocks), 2), drop_state=False)
    own_blocks = model_blocks(reference).blocks
    own = {name: AdamW(held, **OPTIONS) for name, held in own_blocks.items()}
    for step in range(24):
        turns.begin_step(step)
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        loss_of(reference, step).backward()
        own[turns.active[0]].step()
        reference.zero_grad()
    for name, weight in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=0, atol=1e-10, msg=name)
