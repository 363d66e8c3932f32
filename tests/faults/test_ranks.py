"""Two ranks of which one is signalled, killed, fails, or cannot write."""

from __future__ import annotations

import errno
import os
import re
import signal
import time

import psutil
import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW

from lit_ft.callbacks import AtomicCheckpointIO
from lit_ft.distributed.checkpoint import save_parts
from lit_ft.run.files import read_summary
from lit_ft.storage import atomic as replacing
from lit_ft.storage import checkpoint_folder
from lit_ft.storage.atomic import existing_or_backup
from lit_ft.subspace import SubspaceUpdater, inject
from lit_ft.subspace.projectors import Oja
from tests.support.checkpoints import is_whole
from tests.support.commands import TWO_RANKS, start
from tests.support.ranks import WORLD, average

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("rank", "strategy", "number", "status"),
    [
        (0, "fsdp", signal.SIGTERM, 143),
        (1, "ddp", signal.SIGTERM, 143),
        (1, "fsdp", signal.SIGINT, 130),
    ],
)
def test_a_signal_to_one_rank_stops_and_saves(rank, strategy, number, status, tmp_path):
    process = start(
        *TWO_RANKS, f"run_dir={tmp_path}", f"strategy={strategy}", "trainer.max_steps=4000"
    )
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
    assert is_whole(tmp_path / "checkpoints" / "last.ckpt")


def test_two_ranks_that_are_killed_again_and_again_go_on_and_so_does_one_process(tmp_path):
    """The kill comes anywhere, in saves too, which come after each step."""
    job = [*TWO_RANKS, f"run_dir={tmp_path}", "checkpoint.every_n_steps=1", "resume=auto"]
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
        assert is_whole(path)
        steps.append(AtomicCheckpointIO().load_checkpoint(path)["global_step"])
    end = steps[-1] + 2
    alone = ["strategy=cpu", "trainer.devices=1", "data.batch_size=4"]
    process = start(*job, *alone, f"trainer.max_steps={end}")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert "trainer.devices (was 2, now 1)" in output  # read from the folder of both ranks
    assert 0 < steps[1] < steps[2] < torch.load(last, weights_only=True)["global_step"] == end


@pytest.mark.parametrize(
    ("rank", "strategy", "fault", "ended"),
    [
        (0, "fsdp", "fault", ("failed", "RuntimeError at step 3: a fault of this rank alone")),
        (1, "fsdp", "fault", ("failed", "RuntimeError at step 3: a fault of this rank alone")),
        (0, "ddp", "fault", ("failed", "RuntimeError at step 3: a fault of this rank alone")),
        (1, "ddp", "out_of_memory", ("out_of_memory", "out of memory at step 3")),
    ],
)
def test_a_fault_of_one_rank_ends_both_and_is_shown(rank, strategy, fault, ended, tmp_path):
    fails = ["+callbacks.fails._target_=tests.support.stopping.FailsOnOneRank"]
    fails += [
        "trusted_packages=[tests]",
        f"+callbacks.fails.rank={rank}",
        f"+callbacks.fails.fault={fault}",
        "checkpoint.every_n_steps=2",
    ]
    process = start(*TWO_RANKS, f"run_dir={tmp_path}", f"strategy={strategy}", *fails)
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
    assert is_whole(tmp_path / "checkpoints" / "last.ckpt")
    summary = read_summary(tmp_path)
    status, sentence = ended
    assert summary["status"] == status
    assert summary["ended"] == sentence + (f" (on rank {rank})" if rank else "")
    assert "a fault of this rank alone" in summary["error"]["message"]
    if fault == "out_of_memory":
        assert "The largest part of the memory: " in summary["error"]["message"]


def fail_on(rank, function):
    def write(*args, **kwargs):
        if dist.get_rank() == rank:
            raise OSError(errno.ENOSPC, "No space left on device")
        return function(*args, **kwargs)

    return write


def save_twice(target, rank, part):
    """Save a good checkpoint, then one of which a rank cannot write `part`; return what is told."""
    good = {"state_dict": {"weight": torch.ones(3)}, "epoch": 1}
    save_parts(good, target)
    owner, name = {
        "parts": (checkpoint_folder.FileSystemWriter, "write_data"),
        "rest": (checkpoint_folder.torch, "save"),
        "place": (replacing.Path, "replace"),
    }[part]
    working = getattr(owner, name)
    setattr(owner, name, fail_on(rank, working))
    try:
        save_parts({**good, "state_dict": {"weight": torch.zeros(3)}, "epoch": 2}, target)
    except OSError as error:
        return str(error)
    finally:
        setattr(owner, name, working)


@pytest.mark.parametrize(("rank", "part"), [(0, "parts"), (1, "parts"), (0, "rest"), (0, "place")])
def test_a_rank_that_cannot_write_fails_all_and_leaves_the_one_before(
    rank, part, tmp_path, on_both
):
    for told in on_both(save_twice, tmp_path / "last.ckpt", rank, part):
        assert "last.ckpt: " in told
        assert "No space left on device. The previous one, if any, is intact" in told
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    found = AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")
    assert (found["epoch"], found["state_dict"]["weight"].sum()) == (1, 3)


def bad_gradient_of_the_last_row():
    """Return what a rank is told of a gradient that is bad where only the last rank sees it."""
    model = nn.Sequential(nn.Linear(6, 8))
    layers = inject(model, rank=2)
    fully_shard(model)
    optimizer = AdamW(p for p in model.parameters() if p.requires_grad)
    steps = SubspaceUpdater(layers, Oja(every=1), all_reduce=average)
    steps.attach(optimizer)
    [layer] = layers.values()
    layer.delta.grad = torch.zeros_like(layer.delta)
    if dist.get_rank() == WORLD - 1:
        layer.delta.grad.to_local()[-1] = torch.nan
    try:
        steps.before_step(optimizer)
    except FloatingPointError as error:
        return str(error)
    return "nothing"


def test_a_bad_gradient_stops_every_rank(on_both):
    for message in on_both(bad_gradient_of_the_last_row):
        assert "gradient of 0 is not finite" in message
