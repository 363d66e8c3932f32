"""Blocks in turns on two ranks: FSDP2 and tensor parallelism train as one process, and resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.sharded_training import save_llama, train

pytestmark = pytest.mark.slow

BLOCKS = {"every": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_llama(folder, tie_word_embeddings=False)
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adamw_fused", "clip": 0.5, "accumulate": 2},
        {"layerwise": True},
        {"optimizer": "adamw_8bit", "activation_checkpointing": True},
        {"cpu_offload": True, "clip": 0.01},
        {"blocks": {"every": 1, "active": 2, "always": ["head"]}},
        {"blocks": {"every": 2, "state": "keep", "order": "descending"}},
    ],
    ids=str,
)
def test_two_ranks_train_as_one_process(options, model, tmp_path, on_both):
    options = {"blocks": BLOCKS, **options}
    alone = {k: v for k, v in options.items() if k != "cpu_offload"}
    weights, _, loss = train(model, tmp_path / "alone", sharded=False, **alone)
    ranks = on_both(train, model, tmp_path / "ranks", sharded=True, **options)
    for theirs, held, their_loss in ranks:
        assert "DTensor" in held.values()
        for name, weight in weights.items():
            torch.testing.assert_close(theirs[name], weight, rtol=0, atol=1e-10, msg=name)
        assert their_loss["train_loss"] == pytest.approx(loss["train_loss"], rel=1e-9)
    assert all(ranks[1][0][name].equal(ranks[0][0][name]) for name in weights)


@pytest.mark.parametrize("parts", [True, False])
@pytest.mark.parametrize("steps", [5, 6])  # inside a turn, and between two
def test_what_two_ranks_save_goes_on_anywhere(steps, parts, model, tmp_path, on_both):
    options = {"blocks": BLOCKS, "optimizer": "adamw_fused"}
    weights, _, _ = train(model, tmp_path / "whole", sharded=False, **options)
    on_both(train, model, tmp_path, sharded=True, steps=steps, parts=parts, **options)
    options["resume"] = str(tmp_path / "checkpoints" / "last.ckpt")
    ends = [train(model, tmp_path / "one", sharded=False, **options)]
    ends += on_both(train, model, tmp_path / "two", sharded=True, **options)
    for theirs, _, _ in ends:
        for name, weight in weights.items():
            torch.testing.assert_close(theirs[name], weight, rtol=0, atol=1e-10, msg=name)


def test_the_file_of_one_process_goes_on_on_two_ranks(model, tmp_path, on_both):
    options = {"blocks": BLOCKS, "optimizer": "adamw_8bit"}
    weights, _, _ = train(model, tmp_path / "whole", sharded=False, **options)
    train(model, tmp_path, sharded=False, steps=5, **options)
    options["resume"] = str(tmp_path / "checkpoints" / "last.ckpt")
    for theirs, _, _ in on_both(train, model, tmp_path / "two", sharded=True, **options):
        for name, weight in weights.items():
            torch.testing.assert_close(theirs[name], weight, rtol=0, atol=1e-10, msg=name)
