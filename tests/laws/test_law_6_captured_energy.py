"""Law 6: what the rules' bases capture of real gradients, against the best bases of their rank."""

from __future__ import annotations

import inspect
import textwrap

import pytest
import torch
from captured_energy import LAYERS, Factors, energies, iterated
from support.smollm2 import SMOLLM2
from torch import Tensor

from lit_ft.loss.chunked import ChunkedCrossEntropy
from lit_ft.subspace import basis_tracker

RANK = 64
TEXT = inspect.getsource(textwrap.TextWrapper)


@pytest.fixture(scope="module")
def factors() -> dict[str, tuple[Tensor, Tensor]]:
    model, tokenizer = SMOLLM2.load_model(torch.float32), SMOLLM2.load_tokenizer()
    factors = Factors({name: model.get_submodule(name) for name in LAYERS})
    ids = torch.tensor([tokenizer(TEXT)["input_ids"][:512]])
    ChunkedCrossEntropy()(model, {"input_ids": ids}, ids).backward()
    return factors.found


@pytest.mark.parametrize("name", LAYERS)
def test_subspace_iteration_finds_99_percent_of_what_an_svd_finds(name, factors) -> None:
    rows, cols = factors[name]
    basis = iterated(rows, cols, rank=RANK, rounds=basis_tracker._START_ROUNDS)
    captured, best = energies(rows[0].T @ cols[0], basis)
    assert captured / best >= 0.99, f"{captured / best:.4f}"
