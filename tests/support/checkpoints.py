"""What a run's checkpoint holds, and whether two runs hold the same."""

from __future__ import annotations

import torch
from torch.utils._pytree import tree_flatten


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
