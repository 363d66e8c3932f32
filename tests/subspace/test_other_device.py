"""Training in subspaces where no tensor is on the CPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_ft.subspace import inject
from tests.support.tiny_model import tiny_model


@pytest.mark.slow
def test_every_rule_trains_on_a_device_that_is_not_the_cpu():
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.support.other_device"]
    tried = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert tried.returncode == 0, tried.stdout[-3000:] + tried.stderr[-3000:]


def test_bases_start_alike_under_another_default_device():
    """As Lightning calls `configure_model`, with the GPU as the default for new tensors."""
    plain = inject(tiny_model("llama"), rank=4)
    model = tiny_model("llama")
    with torch.device("meta"):
        layers = inject(model, rank=4)
    for name, layer in layers.items():
        assert torch.equal(layer.basis, plain[name].basis)
        assert layer.delta.device.type == layer.energy.device.type == "cpu"
