"""What a run's checkpoint holds, and whether two runs hold the same."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.optim import AdamW
from torch.utils._pytree import tree_flatten

from lit_ft.callbacks import AtomicCheckpointIO
from lit_ft.storage.checkpoint_folder import write_parts, write_rest


def state(folder, name="last"):
    checkpoint = torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
    return [checkpoint.get(key) for key in ("state_dict", "optimizer_states", "lr_schedulers")]


def in_order(value):
    """Dicts sorted by key: in which order an optimizer met its parameters does not matter."""
    if isinstance(value, dict):
        return {key: in_order(value[key]) for key in sorted(value, key=str)}
    return [in_order(item) for item in value] if isinstance(value, list | tuple) else value


def same(a, b):
    leaves, structure = tree_flatten(in_order(state(a)))
    others, other_structure = tree_flatten(in_order(state(b)))
    assert structure == other_structure
    for ours, theirs in zip(leaves, others, strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


class Poison:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return self.marker.touch, ()


def trained():
    """Return a layer and its optimizer after one step."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).bfloat16()
    optimizer = AdamW(model.parameters(), lr=0.1, betas=(0.8, 0.9))
    model(torch.ones(2, 4).bfloat16()).sum().backward()
    optimizer.step()
    return model, optimizer


def write_checkpoint(folder, lr=0.1, rest=None):
    """What a run saves, as one rank writes it."""
    model, optimizer = trained()
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = lr
    folder.mkdir()
    write_parts({"state_dict": model.state_dict(), "optimizer_0": state}, folder)
    write_rest({"global_step": 1, "callbacks": rest or {"a": [1, None]}}, folder)
    return folder


def is_whole(checkpoint: Path) -> bool:
    """Return whether a checkpoint loads, and all its weights are numbers."""
    state = AtomicCheckpointIO().load_checkpoint(checkpoint)["state_dict"]
    return all(value.isfinite().all() for value in state.values())
