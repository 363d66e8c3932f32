"""Law 9: exported models carry neither basis nor delta."""

import torch

from lit_ft.subspace.projectors import Oja
from tests.support.subspace_run import Run, batches


def test_saved_models_carry_neither_basis_nor_delta(tmp_path):
    """Law 9."""
    from safetensors.torch import load_file

    run = Run(Oja(every=1)).train(batches(2))
    run.model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert not [name for name in saved if "delta" in name or "basis" in name]
    for name, weight in saved.items():
        assert torch.equal(weight, run.weights[name].detach())
