"""What a batch holds: tokens, and squared lengths."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lit_ft.measure.batch_counts import count_tokens, sum_squared_lengths


def test_squared_lengths_come_from_what_the_batch_has():
    count = sum_squared_lengths
    ids = torch.zeros(2, 5, dtype=torch.long)
    assert count({"input_ids": ids}) == 2 * 25
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert count({"input_ids": ids, "attention_mask": mask}) == 9 + 25
    packed = torch.tensor([[0, 1, 2, 0, 1]])
    assert count({"input_ids": ids[:1], "position_ids": packed}) == 9 + 4


@pytest.mark.parametrize(
    ("batch", "tokens"),
    [
        ({"num_tokens": 3, "attention_mask": torch.ones(2, 2)}, 3),
        ({"attention_mask": torch.tensor([[1, 0], [1, 1]]), "input_ids": torch.ones(2, 2)}, 3),
        ({"input_ids": torch.ones(2, 2)}, 4),
    ],
)
def test_tokens_are_those_that_are_not_padding(batch, tokens):
    assert count_tokens(batch) == tokens


def test_a_batch_without_tokens_names_the_remedy():
    with pytest.raises(MisconfigurationException, match=r"num_tokens=\.\.\."):
        count_tokens((torch.zeros(2, 3), torch.zeros(2)))
