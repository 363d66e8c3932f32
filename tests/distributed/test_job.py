"""`python train.py` on two ranks in real processes: it trains, stops on a signal, fails whole."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops import utilities as loops
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lit_ft.callbacks import AtomicCheckpointIO
from lit_ft.chat import main as chat
from lit_ft.export import main as export
from lit_ft.storage.atomic import existing_or_backup
from tests.support.commands import TINY, start

pytestmark = pytest.mark.slow

JOB = [
    *TINY,
    "trainer.devices=2",
    "optim=galore_subspace",
    "galore.rank=8",
    "data.batch_size=2",
]


class Fails(Callback):
    """Raises on one rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == 3:
            raise RuntimeError("a fault of this rank alone")


class AsOnNCCL(Callback):
    """Lets Lightning validate in inference mode, which it does not do on gloo."""

    def __init__(self) -> None:
        loops._distributed_is_initialized = lambda: False


def whole(checkpoint: Path) -> bool:
    state = AtomicCheckpointIO().load_checkpoint(checkpoint)["state_dict"]
    return all(value.isfinite().all() for value in state.values())


def test_it_trains_and_leaves_what_one_process_leaves(tmp_path, capsys):
    process = start(*JOB, f"run_dir={tmp_path}", "strategy=fsdp", "trainer.max_steps=3")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("completed", 3)
    assert summary["val_loss"] < summary["initial_val_loss"]
    assert whole(tmp_path / "checkpoints" / "last.ckpt")
    exported = weights_of(tmp_path / "export")
    export([str(tmp_path), "--output", str(tmp_path / "last")])
    assert_equal(weights_of(tmp_path / "last"), exported)
    export([str(tmp_path), "--checkpoint", "best", "--output", str(tmp_path / "best")])
    assert_equal(weights_of(tmp_path / "best"), exported)  # the last validation was the best
    capsys.readouterr()
    chat([str(tmp_path / "last"), "--prompt", "What is it?", "--max-new-tokens", "2"])
    assert capsys.readouterr().out


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_an_adapter_trains_and_leaves_what_one_process_leaves(adapter, tmp_path, capsys):
    job = [*TINY, f"adapter={adapter}", "optim=sgd", "optim.lr=3", "trainer.max_steps=4", "seed=3"]
    job += ["trainer.devices=2", "data.batch_size=2", "trainer.accumulate_grad_batches=2"]
    one = ["strategy=cpu", "trainer.devices=1", "data.batch_size=4"]
    for name, options in (("one", one), ("two", ["strategy=fsdp"])):
        process = start(*job, *options, f"run_dir={tmp_path / name}")
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output
    one, two = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("one", "two"))
    assert (two["status"], two["steps"]) == ("completed", 4)
    assert two["model"]["trainable_parameters"] == one["model"]["trainable_parameters"]
    for key in ("initial_val_loss", "val_loss", "train_loss"):
        assert two[key] == pytest.approx(one[key], rel=1e-5), key
    exported = weights_of(tmp_path / "two" / "export")
    expected = weights_of(tmp_path / "one" / "export")
    torch.testing.assert_close(exported, expected, rtol=0, atol=1e-5)
    export([str(tmp_path / "two"), "--output", str(tmp_path / "last")])
    assert_equal(weights_of(tmp_path / "last"), exported)
    export([str(tmp_path / "two"), "--adapter-only", "--output", str(tmp_path / "apart")])
    apart, written = (
        load_file(path / "adapter_model.safetensors")
        for path in (tmp_path / "apart", tmp_path / "two" / "export" / "adapter")
    )
    assert_equal(apart, written)
    capsys.readouterr()
    chat([str(tmp_path / "two"), "--prompt", "What is it?", "--max-new-tokens", "2"])
    assert capsys.readouterr().out


def weights_of(folder: Path) -> dict[str, Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_layers_streamed_from_the_host_train_the_same_weights(tmp_path):
    ends = []
    for strategy in ("cpu", "single_gpu_offload"):
        folder = tmp_path / strategy
        options = [*JOB, "trainer.devices=1", "trainer.max_steps=4", "~callbacks.export"]
        options.append("+callbacks.nccl._target_=tests.distributed.test_job.AsOnNCCL")
        options.append("trusted_packages=[tests]")
        process = start(*options, f"strategy={strategy}", f"run_dir={folder}")
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output
        ends.append(AtomicCheckpointIO().load_checkpoint(folder / "checkpoints" / "last.ckpt"))
    torch.testing.assert_close(ends[1]["state_dict"], ends[0]["state_dict"], rtol=0, atol=0)


@pytest.mark.parametrize(
    "strategy, number, status",
    [("fsdp", signal.SIGTERM, 143), ("ddp", signal.SIGTERM, 143), ("ddp", signal.SIGINT, 130)],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_and_saves(rank, strategy, number, status, tmp_path):
    process = start(*JOB, f"run_dir={tmp_path}", f"strategy={strategy}", "trainer.max_steps=4000")
    for line in process.stdout:
        if "step 5/" in line:
            break
    [other] = psutil.Process(process.pid).children()
    os.kill((process.pid, other.pid)[rank], number)
    began = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert process.returncode == status, output
    assert not other.is_running() or other.status() == psutil.STATUS_ZOMBIE
    assert whole(tmp_path / "checkpoints" / "last.ckpt")


def test_two_ranks_that_are_killed_again_and_again_go_on_and_so_does_one_process(tmp_path):
    """The kill comes anywhere, in saves too, which come after each step."""
    job = [*JOB, f"run_dir={tmp_path}", "checkpoint.every_n_steps=1", "resume=auto"]
    last, steps = tmp_path / "checkpoints" / "last.ckpt", [0]
    for _ in range(2):
        process = start(*job, "strategy=fsdp", "trainer.max_steps=4000")
        for line in process.stdout:
            if (step := re.match(r"step (\d+)/", line)) and int(step[1]) > steps[-1] + 1:
                break
        for rank in [*psutil.Process(process.pid).children(), process]:
            rank.kill()
        process.communicate(timeout=60)
        path = existing_or_backup(last)
        assert whole(path)
        steps.append(AtomicCheckpointIO().load_checkpoint(path)["global_step"])
    end = steps[-1] + 2
    alone = ["strategy=cpu", "trainer.devices=1", "data.batch_size=4"]
    process = start(*job, *alone, f"trainer.max_steps={end}")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert 0 < steps[1] < steps[2] < torch.load(last, weights_only=True)["global_step"] == end


@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_fault_of_one_rank_ends_both_and_is_shown(rank, strategy, tmp_path):
    fails = ["+callbacks.fails._target_=tests.distributed.test_job.Fails"]
    fails += [
        "trusted_packages=[tests]",
        f"+callbacks.fails.rank={rank}",
        "checkpoint.every_n_steps=2",
    ]
    process = start(*JOB, f"run_dir={tmp_path}", f"strategy={strategy}", *fails)
    began = None
    output = ""
    for line in process.stdout:
        output += line
        if began is None and "step 0" in line:
            began = time.monotonic()
    process.wait(timeout=60)
    assert began is not None, output
    assert time.monotonic() - began < 60  # training included
    assert process.returncode not in (0, None)
    logs = output + "".join(path.read_text() for path in tmp_path.glob("train*.log"))
    assert "a fault of this rank alone" in logs
    assert whole(tmp_path / "checkpoints" / "last.ckpt")
