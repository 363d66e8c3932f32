"""The random bases that training starts from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lit_ft.subspace import inject


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_they_do_not_depend_on_the_number_of_threads(threads):
    bases = []
    for number in (1, 2):
        threads(number)
        [layer] = inject(nn.Sequential(nn.Linear(1536, 64)), rank=128).values()
        bases.append(layer.basis)
        assert torch.get_num_threads() == number
    torch.testing.assert_close(*bases, rtol=0, atol=0)
