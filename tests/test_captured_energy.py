"""Law 6: what the rules' bases capture of real gradients, against the best bases of their rank."""

from __future__ import annotations

import inspect
import textwrap

import pytest
import torch
from captured_energy import LAYERS, Gradients
from support.smollm2 import SMOLLM2
from torch import Tensor

from lit_ft.loss.chunked import ChunkedCrossEntropy
from lit_ft.subspace import basis_tracker as bases
from lit_ft.subspace.layers.products import projected_gradient_and_sketch
from lit_ft.subspace.projectors import SubspaceIteration

RANK = 64
TEXT = inspect.getsource(textwrap.TextWrapper)


class Products(Gradients):
    """Keeps the two factors of each gradient in its place."""

    def _form(self, name: str, grad: Tensor) -> None:
        self.found[name] = (grad.detach(), self.inputs.pop(name))


@pytest.fixture(scope="module")
def factors() -> dict[str, tuple[Tensor, Tensor]]:
    model, tokenizer = SMOLLM2.load_model(torch.float32), SMOLLM2.load_tokenizer()
    gradients = Products({name: model.get_submodule(name) for name in LAYERS})
    ids = torch.tensor([tokenizer(TEXT)["input_ids"][:512]])
    ChunkedCrossEntropy()(model, {"input_ids": ids}, ids).backward()
    return gradients.found


@pytest.mark.parametrize("name", LAYERS)
def test_subspace_iteration_finds_99_percent_of_what_an_svd_finds(name, factors) -> None:
    rows, cols = factors[name]
    gradient = rows[0].T @ cols[0]
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(cols.shape[-1], RANK)).Q.T
    for _ in range(bases._START_ROUNDS):
        _, sketch = projected_gradient_and_sketch(rows, cols, cols @ basis.T)
        basis = SubspaceIteration().move(
            basis, sketch, state={}, decay=1.0, generator=torch.Generator()
        )
    captured = (gradient @ basis.T).square().sum()
    best = torch.linalg.svdvals(gradient)[:RANK].square().sum()
    assert captured / best >= 0.99, f"{captured / best:.4f}"
