"""Trains in subspaces on a device that is not the CPU: tensors without values, which may not mix.

`python -m tests.support.other_device`: a process of its own, for torch registers a device for good.
"""

from __future__ import annotations

import os
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import SGD, AdamW
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

from lit_ft.loss.chunked import ChunkedCrossEntropy
from lit_ft.subspace import SubspaceUpdater, inject
from lit_ft.subspace import basis_tracker as bases
from lit_ft.subspace.layers import base as layer
from lit_ft.subspace.layers import head
from lit_ft.subspace.projectors import SVD, Oja, Projector, Random, SubspaceIteration
from tests.support.tiny_model import tiny_model

DEVICE = "far"
CASES = (
    ("right", torch.bfloat16, AdamW, False),  # what a GPU does by default
    ("right", torch.float32, AdamW, True),
    ("left", torch.bfloat16, SGD, False),
)
PROJECTORS = (Oja(every=1), SubspaceIteration(every=1), SVD(every=1), Random(every=1))


class _Far(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def _generator(device: torch.device, *_: int) -> torch.Generator:
    """A generator for the device, which has none: asked for the right one all the same."""
    assert device.type == DEVICE, device
    return torch.Generator()


def _pieces(targets: Tensor, *_: Any, **__: Any) -> list[tuple[Tensor, Tensor]]:
    """The head's pieces, which depend on values."""
    columns = torch.arange(targets.shape[1], device=targets.device)
    return [(torch.full_like(columns, row), columns) for row in range(len(targets))]


def _moved(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    there: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                new = nn.Parameter(torch.empty(weight.shape, dtype=dtype, device=DEVICE))
                module._parameters[name] = there.setdefault(weight, new)
        for name, values in module._buffers.items():
            if values is not None:
                module._buffers[name] = torch.empty_like(values, device=DEVICE)
    return model


def train(
    projector: Projector, side: Any, dtype: torch.dtype, optimizer: Any, watched: bool
) -> None:
    """Take four steps, each of which moves every basis."""
    model = _moved(tiny_model("llama", tie_word_embeddings=True), dtype)
    with torch.device(DEVICE):  # as Lightning calls `configure_model`
        layers = inject(model, rank=4, side=side)
    stepped = optimizer([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    steps = SubspaceUpdater(layers, projector)
    steps.attach(stepped)
    ids = torch.zeros(2, 8, dtype=torch.long, device=DEVICE)
    for _ in range(4):
        if watched:
            steps.stats.await_snapshot(1)
        ChunkedCrossEntropy()(model, {"input_ids": ids}, ids).backward()
        steps.before_step(stepped, skips_overflow=True)  # else it looks at values
        stepped.step()
        stepped.zero_grad()
    for name, tensor in model.state_dict().items():
        assert tensor.device.type == DEVICE, name


def main() -> None:
    """Try all combinations; the first that fails raises."""
    _setup_privateuseone_for_python_backend(DEVICE, _Far())
    with (
        patch.object(head, "_pieces", _pieces),
        patch.object(layer, "keyed_generator", _generator),
        patch.object(bases, "keyed_generator", _generator),
    ):
        for projector, case in product(PROJECTORS, CASES):
            print(projector, *case, flush=True)
            with FakeTensorMode(allow_non_fake_inputs=True):
                train(projector, *case)


if __name__ == "__main__":
    main()
    os._exit(0)  # the device has no end that torch's threads could wait for
