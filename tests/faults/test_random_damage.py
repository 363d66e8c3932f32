"""Two hundred flipped bits and fifty cuts, anywhere in what runs and a model's cache leave."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_ft.models import FromConfig
from lit_ft.run.resume import checkpoint_to_resume
from lit_ft.storage.checkpoint_io import AtomicCheckpointIO
from lit_ft.storage.damage import damage, write_checksums
from lit_ft.storage.json_file import read_json
from tests.support.checkpoints import in_order, same
from tests.support.commands import TWO_RANKS, run
from tests.support.damaging import damaged_once, flip
from tests.support.stopping import at, stopped
from tests.support.tiny_module import TINY

pytestmark = pytest.mark.slow

OPTIONS = ["optim=adamw", "checkpoint.every_n_steps=2"]
OF_A_RUN = ("last.ckpt", "last-1.ckpt", "best.ckpt", "best.json", "../summary.json")


@pytest.fixture
def left(job, tmp_path) -> list[Path]:
    """Return the files and folders of a run in one process, of one on two ranks, and the cache."""
    job("one", *OPTIONS)
    status, said = run(
        *TWO_RANKS,
        f"run_dir={tmp_path}/two",
        "strategy=fsdp",
        "trainer.max_steps=4",
        "checkpoint.every_n_steps=2",
    )
    assert status == 0, said
    cache = tmp_path / "cache"
    FromConfig("llama", TINY).load_model(torch.float32).save_pretrained(cache)
    write_checksums(cache)
    runs = [tmp_path / name / "checkpoints" / file for name in ("one", "two") for file in OF_A_RUN]
    assert all(path.exists() for path in runs)
    return [cache, *runs]


def is_noticed(path: Path) -> bool:
    if path.suffix != ".json":
        return damage(path) is not None
    try:
        read_json(path)
    except ValueError as error:
        return str(error).startswith(f"{path} is damaged")
    return False


def meaning(path: Path) -> object:
    """Return what is read from a file of a run."""
    if path.suffix == ".json":
        return read_json(path)
    return in_order(AtomicCheckpointIO().load_checkpoint(path))


def test_damage_is_noticed_wherever_it_changes_anything(left):
    draw = random.Random(0)
    noticed = 0
    for turn in range(250):
        target = draw.choice(left)
        files = [target] if target.is_file() else sorted(f for f in target.iterdir() if f.is_file())
        file = draw.choice(files)
        whole = file.read_bytes()
        file.write_bytes(damaged_once(whole, draw, cut=turn >= 200))
        if is_noticed(target):
            noticed += 1
        else:  # it lies between torch's records, in white space, or in the word "checksum"
            found: Any = meaning(target)
            file.write_bytes(whole)
            expected: Any = meaning(target)
            found = {name: found[name] for name in expected}
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
        file.write_bytes(whole)
        assert not is_noticed(target)
    assert noticed > 240


@pytest.mark.parametrize("seed", range(4))
def test_a_run_goes_on_from_the_last_good_state(job, tmp_path, recwarn, seed):
    """`best.json` and `summary.json` are damaged too, which ends no run."""
    job("whole", *OPTIONS)
    stopped(job, "parts", *OPTIONS, *at("on_train_batch_start", 4))
    draw = random.Random(seed)
    folder = tmp_path / "parts" / "checkpoints"
    names = [name for name in OF_A_RUN if (folder / name).exists() and name != "last-1.ckpt"]
    for name in names:
        whole = (folder / name).read_bytes()
        while not is_noticed(folder / name):
            (folder / name).write_bytes(damaged_once(whole, draw, cut=seed % 2 == 1))
    resumed = job("parts", *OPTIONS, "resume=auto")
    assert (resumed["status"], resumed["steps"]) == ("completed", 9)
    same(tmp_path / "whole", tmp_path / "parts")
    said = "\n".join(str(one.message) for one in recwarn)
    assert all(f"{Path(name).name} is damaged" in said for name in names if name != "best.ckpt")


def test_ranks_go_on_from_the_last_good_state(left, tmp_path):
    folder = tmp_path / "two"
    options = [*TWO_RANKS, "strategy=fsdp", "trainer.max_steps=6", "resume=auto"]
    shutil.copytree(folder, tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "checkpoints" / "last.ckpt")
    last = folder / "checkpoints" / "last.ckpt"
    part = sorted(last.glob("*.distcp"))[0]
    flip(part)
    assert checkpoint_to_resume("auto", folder) == last.with_name("last-1.ckpt")
    for name in ("two", "other"):
        status, said = run(*options, f"run_dir={tmp_path}/{name}")
        assert status == 0, said
        assert ("last.ckpt is damaged" in said) == (name == "two")
    read = AtomicCheckpointIO().load_checkpoint
    one, two = (
        read(tmp_path / name / "checkpoints" / "last.ckpt")["state_dict"]
        for name in ("two", "other")
    )
    torch.testing.assert_close(one, two, rtol=0, atol=0)
