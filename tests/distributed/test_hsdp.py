"""Two replicas of the model, each on two ranks: what one process does, and what travels where."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import ModelParallelStrategy
from transformers import AutoModelForCausalLM

from lit_ft.distributed import FSDP2Strategy
from lit_ft.models import Pretrained
from tests.support.joining import joined
from tests.support.sharded_training import train
from tests.support.tiny_module import trainer_of

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate": 2, "clip": 0.5},
        {"optimizer": "adamw_fused", "layerwise": True},
        {"projector": "oja", "accumulate": 2, "clip": 0.01},
        {"projector": "iteration", "layerwise": True},
    ],
)
def test_two_replicas_of_two_ranks_train_what_one_process_does(
    options, folder, tmp_path, four_ranks
):
    model = folder / "tied_True"
    weights, _, loss = train(model, tmp_path / "one", sharded=False, **options)
    four = four_ranks(train, model, tmp_path / "four", sharded=True, replicas=2, **options)
    for theirs, held, their_loss in four:
        assert set(held.values()) == {"DTensor"}
        for name, weight in weights.items():
            torch.testing.assert_close(theirs[name], weight, rtol=0, atol=1e-10, msg=name)
        for name, value in loss.items():
            assert their_loss[name] == pytest.approx(value, rel=1e-9)
    for theirs, _, _ in four[1:]:
        for name in weights:
            assert theirs[name].equal(four[0][0][name]), name


def test_what_four_ranks_save_and_export_is_whole(folder, tmp_path, four_ranks):
    model, options = folder / "tied_True", {"projector": "oja", "optimizer": "adamw_fused"}
    weights, _, _ = train(model, tmp_path / "one", sharded=False, **options)
    four_ranks(train, model, tmp_path / "part", sharded=True, replicas=2, steps=6, **options)
    options["resume"] = str(tmp_path / "part" / "checkpoints" / "last.ckpt")
    options["export"] = "float64"
    rest = four_ranks(train, model, tmp_path / "rest", sharded=True, replicas=2, **options)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "rest" / "export", dtype="auto")
    for theirs, _, _ in rest:
        for name, weight in weights.items():
            torch.testing.assert_close(theirs[name], weight, rtol=0, atol=1e-10, msg=name)
        for name, weight in exported.state_dict().items():
            assert weight.equal(theirs[name]), name


def where_rows_are(model_folder):
    """Return which rows of a matrix this rank holds, by their first and last values."""
    strategy = FSDP2Strategy(data_parallel_replicate_size=2)
    module = joined(Pretrained(str(model_folder)), strategy=strategy)
    module.configure_model()
    return module.model.lm_head.weight.to_local().detach()


def test_neighbours_share_a_replica(folder, four_ranks):
    """Ranks 0 and 1 are on one node: weights are gathered between them, not with rank 2."""
    parts = four_ranks(where_rows_are, folder / "tied_False")
    assert parts[0].equal(parts[2]) and parts[1].equal(parts[3])
    loaded = AutoModelForCausalLM.from_pretrained(folder / "tied_False").lm_head.weight
    assert torch.cat(parts[:2]).equal(loaded)


@pytest.mark.parametrize("replicas", [0, -1, 1.5, "each"])
def test_replicas_are_a_number(replicas):
    with pytest.raises(MisconfigurationException, match="data_parallel_replicate_size=.*auto"):
        FSDP2Strategy(data_parallel_replicate_size=replicas)


def test_ranks_that_replicas_do_not_divide_are_refused_before_they_meet(tmp_path, monkeypatch):
    monkeypatch.setattr(ModelParallelStrategy, "setup_environment", lambda _: pytest.fail("met"))
    strategy = FSDP2Strategy(data_parallel_replicate_size=3)
    trainer_of(tmp_path, strategy=strategy, devices=4, num_nodes=2)
    with pytest.raises(MisconfigurationException, match="8 ranks .2 nodes of 4 devices") as raised:
        strategy.setup_environment()
    assert "strategy=fsdp" in raised.value.on_command_line


def test_there_is_a_replica_on_each_node(tmp_path):
    strategy = FSDP2Strategy(data_parallel_replicate_size="auto")
    trainer_of(tmp_path, strategy=strategy, devices=4, num_nodes=2)
    assert strategy.num_replicas == 2
