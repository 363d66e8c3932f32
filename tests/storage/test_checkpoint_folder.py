"""Reading a folder of several ranks' files: it equals what was saved, and no code runs from it."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from lit_ft.callbacks import AtomicCheckpointIO
from lit_ft.storage.checkpoint_folder import CheckpointFolder, write_parts, write_rest


class Poison:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return self.marker.touch, ()


def trained():
    torch.manual_seed(0)
    model = nn.Linear(4, 3).bfloat16()
    optimizer = AdamW(model.parameters(), lr=0.1, betas=(0.8, 0.9))
    model(torch.ones(2, 4).bfloat16()).sum().backward()
    optimizer.step()
    return model, optimizer


def write(folder, lr=0.1, rest=None):
    """What a run saves, as one rank writes it."""
    model, optimizer = trained()
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = lr
    folder.mkdir()
    write_parts({"state_dict": model.state_dict(), "optimizer_0": state}, folder)
    write_rest({"global_step": 1, "callbacks": rest or {"a": [1, None]}}, folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return write(tmp_path_factory.mktemp("saved") / "last.ckpt")


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "last.ckpt")


def test_it_is_read_as_if_it_had_been_one_file(folder):
    model, optimizer = trained()
    found = AtomicCheckpointIO().load_checkpoint(folder)
    assert found["global_step"] == 1
    assert found["callbacks"] == {"a": [1, None]}
    torch.testing.assert_close(found["state_dict"], model.state_dict(), rtol=0, atol=0)
    [state] = found["optimizer_states"]
    expected = optimizer.state_dict()
    torch.testing.assert_close(
        list(state["state"].values()), list(expected["state"].values()), rtol=0, atol=0
    )
    assert state["param_groups"] == expected["param_groups"]


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
    folder = write(tmp_path / "last.ckpt", rest={"state": Poison(tmp_path / "marker")})
    with pytest.raises(ValueError, match=r"Refusing to read .*last\.ckpt/meta\.pt"):
        AtomicCheckpointIO().load_checkpoint(folder)
    assert not (tmp_path / "marker").exists()


def test_a_poisoned_value_in_a_ranks_file_is_refused(tmp_path):
    folder = write(tmp_path / "last.ckpt", lr=Poison(tmp_path / "marker"))
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
    with pytest.raises(ValueError, match="is not a whole checkpoint"):
        AtomicCheckpointIO().load_checkpoint(folder)


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ({"weight": torch.zeros(3, 4)}, r"Unexpected key\(s\): state_dict\.bias"),
        ({"weight": torch.zeros(3, 5), "bias": torch.zeros(3)}, r"sizes: state_dict\.weight"),
        ({"weight": torch.zeros(3, 4), "basis": torch.zeros(3)}, r"Missing key\(s\).*basis"),
    ],
)
def test_another_model_is_told_by_names_and_not_changed(weights, told, folder):
    with pytest.raises(RuntimeError, match=f"in loading state_dict for .*{told}"):
        CheckpointFolder(folder).load({"state_dict": weights}, alone=True)
    assert not any(weight.any() for weight in weights.values())
