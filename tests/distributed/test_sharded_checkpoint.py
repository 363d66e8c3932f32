"""What two ranks save goes on anywhere, and is exported in little memory."""

from __future__ import annotations

import json
import pickle
import re
import shutil

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.optim import AdamW
from transformers import AutoModelForCausalLM

from lit_ft.callbacks import AtomicCheckpointIO
from lit_ft.distributed.checkpoint import load_parts, save_parts
from lit_ft.models import FromConfig
from lit_ft.run.export_run import export_run
from lit_ft.storage.checkpoint_folder import CheckpointFolder
from tests.support.allocations import watched
from tests.support.sharded_training import LARGER, LLAMA, save_llama, train

pytestmark = pytest.mark.slow

PLANS = {
    "adamw": {"optimizer": "adamw_fused"},
    "oja": {"optimizer": "adamw_fused", "projector": "oja"},
    "iteration": {"projector": "iteration", "layerwise": True},
    # State that is not of its parameter's shape: row and column means, codes and their scales.
    "adafactor": {"optimizer": "adafactor"},
    "oja_adafactor": {"optimizer": "adafactor_fixed", "projector": "oja"},
    "adamw_8bit": {"optimizer": "adamw_8bit"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_llama(folder, tie_word_embeddings=True)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(model, tmp_path_factory):
    """Weights and loss of a plan's ten steps in one process."""
    known = {}

    def of(plan):
        if plan not in known:
            run_dir = tmp_path_factory.mktemp(plan)
            known[plan] = train(model, run_dir, sharded=False, **PLANS[plan])
        return known[plan]

    return of


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory, on_both):
    """The checkpoint of two ranks after six steps: a folder of parts, or a file."""
    known = {}

    def of(plan, parts):
        if (plan, parts) not in known:
            run_dir = tmp_path_factory.mktemp("saved")
            on_both(train, model, run_dir, sharded=True, steps=6, parts=parts, **PLANS[plan])
            known[plan, parts] = run_dir / "checkpoints" / "last.ckpt"
        return known[plan, parts]

    return of


@pytest.mark.parametrize(
    ("plan", "parts", "ranks_after"),
    [
        *[(plan, True, after) for plan in PLANS for after in (0, 1, 2, 4)],
        *[("oja", False, after) for after in (0, 1, 2, 4)],
    ],
)
def test_what_two_ranks_save_goes_on_as_if_nothing_had_been(
    plan, parts, ranks_after, model, saved, uninterrupted, tmp_path, request
):
    weights, _, loss = uninterrupted(plan)
    last = saved(plan, parts)
    assert last.is_dir() is parts
    options = {**PLANS[plan], "resume": str(last)}
    if ranks_after == 0:  # one process that knows nothing of shards
        ends = [train(model, tmp_path, sharded=False, **options)]
    else:
        run = request.getfixturevalue({1: "one_rank", 2: "on_both", 4: "four_ranks"}[ranks_after])
        ends = run(train, model, tmp_path, sharded=True, **options)
    for theirs, _, their_loss in ends:
        for name, weight in weights.items():
            torch.testing.assert_close(theirs[name], weight, rtol=0, atol=1e-10, msg=name)
        assert their_loss["train_loss"] == pytest.approx(loss["train_loss"], rel=1e-9)
    for theirs, _, _ in ends[1:]:
        assert all(theirs[name].equal(ends[0][0][name]) for name in weights)


@pytest.mark.parametrize("plan", ["adamw", "oja", "oja_adafactor", "adamw_8bit"])
def test_the_file_of_one_process_goes_on_on_two_ranks(
    plan, model, uninterrupted, tmp_path, on_both
):
    weights, _, _ = uninterrupted(plan)
    train(model, tmp_path / "part", sharded=False, steps=6, **PLANS[plan])
    last = tmp_path / "part" / "checkpoints" / "last.ckpt"
    assert last.is_file()
    options = {**PLANS[plan], "resume": str(last)}
    for theirs, _, _ in on_both(train, model, tmp_path / "rest", sharded=True, **options):
        for name, weight in weights.items():
            torch.testing.assert_close(theirs[name], weight, rtol=0, atol=1e-10, msg=name)


def refusal(*args, **kwargs):
    try:
        train(*args, sharded=True, **kwargs)
    except (RuntimeError, KeyError, ValueError) as error:
        return type(error).__name__, str(error)


def test_a_checkpoint_that_does_not_fit_is_refused_on_all_ranks(model, saved, tmp_path, on_both):
    adamw, oja = saved("adamw", True), saved("oja", True)
    weights = shutil.copytree(adamw, tmp_path / "best.ckpt")
    drop_optimizer(weights)
    cases = [
        (adamw, PLANS["oja"], "RuntimeError", r"Missing key\(s\) in state_dict: .*\.basis"),
        (oja, PLANS["adamw"], "RuntimeError", r"Unexpected key\(s\): .*\.basis"),
        (adamw, {"optimizer": "sgd"}, "RuntimeError", r"Missing key\(s\): optimizer_0"),
        (weights, PLANS["adamw"], "KeyError", "best.ckpt holds the model alone"),
        (tmp_path, PLANS["adamw"], "ValueError", "is not a complete checkpoint"),
    ]
    for path, plan, kind, told in cases:
        for found in on_both(refusal, model, tmp_path / "run", resume=str(path), **plan):
            assert found[0] == kind
            assert re.search(told, found[1])


def drop_optimizer(folder):
    """Leave what a checkpoint of weights alone has in its list of contents."""
    contents = CheckpointFolder(folder).metadata
    entries = contents.state_dict_metadata
    contents.state_dict_metadata = {n: e for n, e in entries.items() if n.startswith("state_dict.")}
    contents.storage_meta = None
    (folder / ".metadata").write_bytes(pickle.dumps(contents))


def save_model(config, target):
    """Save random weights in two parts."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    empty = FromConfig("llama", config).build_empty()
    weights = {}
    for name, weight in empty.state_dict().items():
        part = torch.randn(weight.chunk(2)[dist.get_rank()].shape)
        weights[f"model.{name}"] = DTensor.from_local(
            part, mesh, [Shard(0)], shape=weight.shape, stride=weight.stride()
        )
    save_parts({"state_dict": weights}, target)


def state_after_a_checkpoint(folder):
    """Train, save and load a module with a wrapped part; return how many parameters have state."""

    def made():
        torch.manual_seed(0)
        part = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        module = nn.Sequential(checkpoint_wrapper(part), nn.Linear(8, 4))
        fully_shard(module)
        return module, AdamW(module.parameters())

    module, optimizer = made()
    module(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    states = [get_optimizer_state_dict(module, optimizer)]
    save_parts({"state_dict": module.state_dict(), "optimizer_states": states}, folder)
    module, optimizer = made()
    load_parts(folder, module, [optimizer])
    return len(optimizer.state)


def test_parameters_whose_activations_are_checkpointed_get_their_state_back(tmp_path, one_rank):
    assert one_rank(state_after_a_checkpoint, tmp_path / "saved") == [6]


def export(run_dir):
    """Export the run's checkpoint; return the most bytes that this took, and that reading does."""
    options = {"folder": run_dir / f"export{dist.get_rank()}", "max_shard_size": "20MB"}
    export_run(run_dir, **options)  # the first one in a process loads libraries too
    with watched() as most:
        export_run(run_dir, **options)
    with watched() as whole:
        checkpoint = AtomicCheckpointIO().load_checkpoint(run_dir / "checkpoints" / "last.ckpt")
    assert checkpoint.keys() == {"state_dict"}
    return most[0], whole[0]


def test_an_export_holds_one_files_weights_at_a_time(tmp_path, on_both):
    config = {**LLAMA, **LARGER}
    on_both(save_model, config, tmp_path / "checkpoints" / "last.ckpt")
    module = {
        "_target_": "lit_ft.CausalLMModule",
        "model": {"_target_": "lit_ft.models.FromConfig", "model_type": "llama", "config": config},
        "optimizer": {"_target_": "torch.optim.AdamW", "_partial_": True},
    }
    config = {"module": module, "data": {}, "trainer": {}, "trusted_packages": []}
    summary = {"status": "completed", "config": config}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    peaks = on_both(export, tmp_path)
    saved = AtomicCheckpointIO().load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export0").state_dict()
    for name, weight in exported.items():
        assert weight.equal(saved["state_dict"][f"model.{name}"]), name
    size = sum(weight.nbytes for weight in exported.values())
    for peak, whole in peaks:
        assert peak < 0.6 * size  # a file's, what is read for it, and what is not yet collected
        assert 2 * peak < whole  # so that it would be seen
