"""Checkpoints that are damaged or poisoned: nothing is read in part, and no code runs."""

from __future__ import annotations

import json
import os
import pickle
import traceback
from pathlib import Path

import pytest
import torch
from hydra.errors import CompactHydraException
from torch import nn

from lit_ft.callbacks import AtomicCheckpointIO
from lit_ft.distributed.checkpoint import load_file
from lit_ft.run.export_run import export_run
from lit_ft.storage.checkpoint_folder import CheckpointFolder
from lit_ft.storage.checkpoint_io import load_rest
from tests.support.checkpoints import Poison, write_checkpoint
from tests.support.running import SHORT, run_job


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of several ranks' files."""
    return write_checkpoint(tmp_path / "last.ckpt")


def test_a_poisoned_list_of_contents_is_refused_by_name(folder, tmp_path):
    (folder / ".metadata").write_bytes(pickle.dumps(Poison(tmp_path / "marker")))
    with pytest.raises(ValueError, match=r"last\.ckpt/\.metadata: .*names builtins\.getattr"):
        CheckpointFolder(folder)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "name", ["torch.load", "torch.distributed.checkpoint.metadata.os.system", "builtins.exec"]
)
def test_no_name_is_admitted_for_its_neighbourhood(name, folder):
    module, _, attribute = name.rpartition(".")
    if "metadata." in name:
        module, attribute = "torch.distributed.checkpoint.metadata", "os.system"
    text = [pickle.SHORT_BINUNICODE + bytes([len(t)]) + t.encode() for t in (module, attribute)]
    call = b"\x80\x04" + b"".join(text) + pickle.STACK_GLOBAL + b"."
    (folder / ".metadata").write_bytes(call)
    with pytest.raises(ValueError, match="which no checkpoint needs"):
        CheckpointFolder(folder)


def test_a_poisoned_rest_is_refused_by_name(tmp_path):
    folder = write_checkpoint(tmp_path / "last.ckpt", rest={"state": Poison(tmp_path / "marker")})
    with pytest.raises(ValueError, match=r"Refusing to read .*last\.ckpt/meta\.pt"):
        AtomicCheckpointIO().load_checkpoint(folder)
    assert not (tmp_path / "marker").exists()


def test_a_poisoned_value_in_a_ranks_file_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "last.ckpt", lr=Poison(tmp_path / "marker"))
    with pytest.raises(ValueError, match=r"Refusing to read .*last\.ckpt: "):
        AtomicCheckpointIO().load_checkpoint(folder)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", [".metadata", "meta.pt", "__0_0.distcp"])
@pytest.mark.parametrize("size", [0, 100])
def test_a_truncated_file_is_named(name, size, folder):
    with (folder / name).open("r+b") as file:
        file.truncate(size)
    with pytest.raises(ValueError, match=r"Refusing to read .*last\.ckpt"):
        AtomicCheckpointIO().load_checkpoint(folder)


@pytest.mark.parametrize("name", [".metadata", "meta.pt"])
def test_a_folder_without_its_last_files_is_no_checkpoint(name, folder):
    (folder / name).unlink()
    with pytest.raises(ValueError, match="is not a complete checkpoint"):
        AtomicCheckpointIO().load_checkpoint(folder)


READERS = {
    "resume": load_rest,
    "load": lambda path: AtomicCheckpointIO().load_checkpoint(path),
    "load on ranks": lambda path: load_file(path, nn.Linear(1, 1), []),
}
ADVICE = (
    "`weights_only`",
    "weights_only=False",
    "Weights only",
    "safe_globals",
    "Re-running",
    "docs/stable",
)


def assert_without_torchs_advice(text: str) -> None:
    assert not [words for words in ADVICE if words in text], text


def foreign(path: Path, kind: str) -> Path:
    """Write a file of another program that loads only without protection."""
    if kind == "script":
        torch.jit.save(torch.jit.script(nn.Linear(1, 1)), path)
        return path
    content = {
        "poison": {"weights": Poison(path.with_name("marker"))},
        "module": {"model": nn.Linear(1, 1)},
        "blocked": {"call": os.system},
    }
    torch.save(content[kind], path)
    return path


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("poison", "names getattr, which is neither a tensor nor a plain value"),
        ("module", "names torch.nn.modules.linear.Linear, which is neither"),
        ("blocked", "names posix.system, which is neither a tensor nor"),
        ("script", "is a TorchScript archive, which holds code"),
    ],
)
def test_what_a_foreign_file_holds_is_said_without_advice_to_run_it(reader, kind, told, tmp_path):
    path = foreign(tmp_path / "bad.ckpt", kind)
    with pytest.raises(ValueError, match=rf"Refusing to read .*bad\.ckpt: it {told}") as caught:
        READERS[reader](path)
    assert_without_torchs_advice("".join(traceback.format_exception(caught.value)))
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("place", ["rest", "value"])
def test_the_files_of_ranks_are_refused_without_that_advice(place, tmp_path):
    poison = Poison(tmp_path / "marker")
    own = {"rest": {"state": poison}} if place == "rest" else {"lr": poison}
    folder = write_checkpoint(tmp_path / "last.ckpt", **own)
    with pytest.raises(ValueError, match="names getattr, which is neither") as caught:
        AtomicCheckpointIO().load_checkpoint(folder)
    assert_without_torchs_advice("".join(traceback.format_exception(caught.value)))
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("content", [[1, 2], torch.ones(2), None])
def test_a_file_that_holds_no_entries_is_no_checkpoint(content, tmp_path):
    torch.save(content, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match=r"bad\.ckpt is no checkpoint: it holds a"):
        load_rest(tmp_path / "bad.ckpt")


def test_a_run_that_is_given_a_foreign_file_says_so_and_leaves_no_advice(tmp_path):
    path = foreign(tmp_path / "bad.ckpt", "poison")
    for own in ([], ["validate_only=true"]):
        with pytest.raises(CompactHydraException, match="names getattr, which is neither"):
            run_job(tmp_path / "run", "model=tiny", *SHORT, f"resume={path}", *own)
        error = json.loads((tmp_path / "run" / "summary.json").read_text())["error"]
        assert_without_torchs_advice(json.dumps(error))
    with pytest.raises(ValueError, match="names getattr, which is neither"):
        export_run(tmp_path / "run", checkpoint=str(path))
    assert not (tmp_path / "marker").exists()
