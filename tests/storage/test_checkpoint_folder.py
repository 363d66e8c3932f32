"""A folder of several ranks' files is read as what was saved."""

from __future__ import annotations

import pytest
import torch

from lit_ft.callbacks import AtomicCheckpointIO
from lit_ft.storage.checkpoint_folder import CheckpointFolder
from tests.support.checkpoints import trained, write_checkpoint


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of several ranks' files."""
    return write_checkpoint(tmp_path / "last.ckpt")


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
