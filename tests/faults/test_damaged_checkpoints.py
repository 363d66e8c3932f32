"""Checkpoints that are damaged or poisoned: nothing is read in part, and no code runs."""

from __future__ import annotations

import pickle

import pytest
import torch

from lit_ft.callbacks import AtomicCheckpointIO
from lit_ft.storage.checkpoint_folder import CheckpointFolder
from tests.support.checkpoints import Poison, write_checkpoint


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


def test_loading_runs_no_code(tmp_path):
    marker = tmp_path / "marker"

    class Poison:
        def __reduce__(self):
            return marker.touch, ()

    path = tmp_path / "bad.ckpt"
    torch.save({"weights": Poison()}, path)
    with pytest.raises(pickle.UnpicklingError):
        AtomicCheckpointIO().load_checkpoint(path)
    assert not marker.exists()
