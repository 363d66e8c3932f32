"""What cannot be trained in subspaces is refused by name, or said once."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
import torchao.optim
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.optim import SGD, AdamW
from transformers.optimization import Adafactor

from lit_ft.subspace import Refresh, SubspaceUpdater, inject
from lit_ft.subspace.projectors import SVD, Oja, Online
from tests.support.subspace_run import NEVER, Run, batches
from tests.support.tiny_model import tiny_model


@pytest.mark.parametrize(
    ("optimizer", "options", "named"),
    [
        (torch.optim.Adafactor, {}, "scale_parameter=False"),
        (torch.optim.LBFGS, {}, "LBFGS"),
        (torch.optim.Adam, {"weight_decay": 0.1}, "or use AdamW"),
        (SGD, {"weight_decay": 0.1}, "weight_decay=0"),
        (type("OwnSGD", (SGD,), {}), {"weight_decay": 0.1}, "weight_decay=0"),
        (bnb.optim.PagedAdamW8bit, {}, "AdamW8bit"),
        (bnb.optim.PagedLion, {}, "AdamW8bit"),
        (bnb.optim.SGD8bit, {"momentum": 0.9, "weight_decay": 0.1}, "weight_decay=0"),
        (torch.optim.RMSprop, {"weight_decay": 0.1}, "weight_decay=0"),
        (Adafactor, {"lr": None, "scale_parameter": False}, "relative_step=False"),
        (torchao.optim.Adam8bit, {"weight_decay": 0.1}, "Adam8bit adds weight decay"),
        (type("Lamb", (AdamW,), {}), {}, "Lamb scales"),
        (type("FusedLAMB", (AdamW,), {}), {}, "LAMB scales"),
        (type("SAM", (AdamW,), {}), {}, "copies of the parameters"),
    ],
)
def test_optimizers_that_need_the_weight_are_refused(optimizer, options, named):
    with pytest.raises(ValueError, match=named):
        Run(NEVER, optimizer=optimizer, **options)


def test_a_state_with_a_maximum_over_coordinates_is_said_to_have_no_rule(caplog):
    Run(Oja(every=1), optimizer=torch.optim.Adamax).train(batches(2))
    assert "The state of Adamax has no rule" in caplog.text


def test_weights_that_became_float16_are_refused():
    """As Lightning's precision=16-true makes them, after the injection."""
    model = tiny_model("llama")
    steps = SubspaceUpdater(inject(model, rank=4), NEVER)
    optimizer = AdamW([p for p in model.half().parameters() if p.requires_grad])
    with pytest.raises(ValueError, match=r"embed_tokens has float16 weights"):
        steps.attach(optimizer)


def test_a_compiled_models_layers_have_no_turns_of_their_own():
    layers = inject(tiny_model("llama"), rank=4)
    with pytest.raises(ValueError, match="leave out one of the two"):
        SubspaceUpdater(layers, NEVER, compiled=True, refresh=Refresh(adaptive=True))


def test_layers_that_the_loss_does_not_come_through_are_named(caplog):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.borrowed = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return nn.functional.linear(self.used(x), self.borrowed.weight)

    model = Tied()
    steps = SubspaceUpdater(inject(model, rank=2), NEVER)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad])
    steps.attach(optimizer)
    for _ in range(2):
        model(torch.ones(3, 8)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    [warning] = [r.getMessage() for r in caplog.records if "stands still" in r.getMessage()]
    assert "1 of the layers that move in subspaces: borrowed." in warning


def test_an_optimizer_from_before_the_injection_is_refused():
    model = tiny_model("llama")
    optimizer = AdamW(model.parameters())
    steps = SubspaceUpdater(inject(model, rank=4), NEVER)
    with pytest.raises(ValueError, match=r"embed_tokens\.delta"):
        steps.attach(optimizer)


def test_embeddings_that_were_resized_after_the_injection_are_refused():
    model = tiny_model("llama")
    layers = inject(model, rank=4)
    model.resize_token_embeddings(310)
    steps = SubspaceUpdater(layers, NEVER)
    with pytest.raises(ValueError, match=r"embed_tokens is \[310, .*before GaLore"):
        steps.attach(AdamW(model.parameters()))


def refused_on_sharded_weights():
    """Return what a rank is told."""
    plain, by_rows, by_columns = (nn.Sequential(nn.Linear(6, 8, bias=False)) for _ in range(3))
    rows, columns = (inject(model, rank=2) for model in (by_rows, by_columns))
    fully_shard(plain)
    fully_shard(by_rows)
    fully_shard(by_columns, shard_placement_fn=lambda _: Shard(1))

    def attach(model, layers, projector):
        optimizer = AdamW(p for p in model.parameters() if p.requires_grad)
        SubspaceUpdater(layers, projector).attach(optimizer)

    messages = []
    for attempt in (
        lambda: inject(plain, rank=2),
        lambda: attach(by_rows, rows, SVD()),
        lambda: attach(by_rows, rows, Online(starts_from_svd=True)),
        lambda: attach(by_columns, columns, Oja(every=1)),
    ):
        try:
            attempt()
        except ValueError as error:
            messages.append(str(error))
    return messages


@pytest.mark.slow
def test_what_needs_whole_weights_is_refused(on_both):
    for late, svd, start, columns in on_both(refused_on_sharded_weights):
        assert late.startswith("0 is sharded already: call inject first")
        for message in (svd, start):
            assert "no rank has that of 0" in message
            assert "use SubspaceIteration or Oja" in message
        assert "0 is sharded by columns" in columns
