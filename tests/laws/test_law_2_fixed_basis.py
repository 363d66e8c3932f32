"""Law 2: with a basis that rests, or that an SVD renews, subspace training is galore-torch."""

import copy

import pytest
import torch
from galore_torch import GaLoreAdamW
from torch import nn

from lit_ft.subspace.projectors import SVD
from tests.support.subspace_run import Run


def svd_with_fixed_signs(monkeypatch):
    """Singular vectors have arbitrary signs, and galore-torch computes them in float32."""
    svd = torch.linalg.svd

    def fixed(matrix, full_matrices):
        left, values, right = svd(matrix.float(), full_matrices=full_matrices)
        largest = right.gather(1, right.abs().argmax(1, keepdim=True))
        return left * largest.sign().T, values, right * largest.sign()

    monkeypatch.setattr(torch.linalg, "svd", fixed)


@pytest.mark.parametrize("gap", [1000, 4])
def test_svd_without_rotation_is_galore_torch(gap, monkeypatch):
    """Law 2: over two refreshes, in float64, two micro-batches against one batch."""
    svd_with_fixed_signs(monkeypatch)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 9)).double()
    # galore-torch puts eps inside the bias correction, torch outside: with eps -> 0 they agree.
    run = Run(
        SVD(every=gap),
        model=copy.deepcopy(plain),
        scale=0.25,
        lr=1e-2,
        eps=1e-30,
        weight_decay=0,
    )
    galore = {"rank": 4, "update_proj_gap": gap, "scale": 0.25, "proj_type": "right"}
    matrices = [p for p in plain.parameters() if p.ndim == 2]
    vectors = [p for p in plain.parameters() if p.ndim < 2]
    reference = GaLoreAdamW(
        [{"params": vectors}, {"params": matrices, **galore}],
        lr=1e-2,
        eps=1e-30,
        no_deprecation_warning=True,
    )
    for seed in range(10):
        x = torch.randn(6, 12, generator=torch.Generator().manual_seed(seed)).double()
        plain(x).square().sum().backward()
        reference.step()
        reference.zero_grad()
        for rows in x.split(3):
            run.model(rows).square().sum().backward()
        run.steps.before_step(run.optimizer)
        run.optimizer.step()
        run.optimizer.zero_grad()
    others = dict(plain.named_parameters())
    for name, weight in run.weights.items():
        torch.testing.assert_close(weight, others[name], rtol=1e-12, atol=1e-12, msg=name)
