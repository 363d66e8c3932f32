"""Saves that cannot end: full disks, refused renames, interrupts, kills."""

from __future__ import annotations

import os
import resource

import pytest
import torch

from lit_ft.callbacks import AtomicCheckpointIO
from lit_ft.run.resume import checkpoint_to_resume
from lit_ft.storage import checkpoint_io


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "deep" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(3)}, path)
    return path


def unharmed(path) -> bool:
    state = AtomicCheckpointIO().load_checkpoint(path)
    return torch.equal(state["weights"], torch.ones(3)) and os.listdir(path.parent) == [path.name]


def test_a_full_disk_leaves_the_file_before_and_says_so(saved):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"last\.ckpt: .*File too large.* is intact"):
            AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(1_000_000)}, saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert unharmed(saved)


def test_a_rename_that_is_refused_fails_loudly(saved, monkeypatch):
    def refused(self, target):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(saved), "replace", refused)
    with pytest.raises(OSError, match="Permission denied"):
        AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(3)}, saved)
    assert unharmed(saved)


def test_an_interrupt_inside_a_save_leaves_the_file_before(saved, monkeypatch):
    def interrupted(checkpoint, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_io.torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(3)}, saved)
    assert unharmed(saved)


def test_what_a_killed_save_left_is_cleared_by_the_next(saved):
    saved.with_name(".last.ckpt.tmp").write_bytes(b"torn")
    AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(3)}, saved)
    assert unharmed(saved)


def test_resuming_takes_what_a_killed_save_has_left_whole_and_never_a_half(tmp_path, caplog):
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / ".last.ckpt.tmp").mkdir(parents=True)
    caplog.set_level("INFO")
    assert checkpoint_to_resume("auto", tmp_path) is None
    assert f"There is no checkpoint in {tmp_path}: the run starts afresh." in caplog.text
    before = checkpoints / ".last.ckpt.old"
    before.mkdir()
    last = checkpoints / "last.ckpt"
    assert checkpoint_to_resume("auto", tmp_path) == before
    assert checkpoint_to_resume(str(last), tmp_path) == before
    last.mkdir()
    assert checkpoint_to_resume("auto", tmp_path) == last
