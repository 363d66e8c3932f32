"""Which token ids a tokenizer gives, and which of them are in a table of examples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

if TYPE_CHECKING:
    from datasets import Dataset

CHUNK = 10_000  # rows that are looked at together


def num_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of rows with which a table has one for each token of the tokenizer."""
    return int(max(tokenizer.get_vocab().values())) + 1  # above its length if ids are left out


def ids_from(table: Dataset, first: int) -> NDArray[np.int64]:
    """Return the token ids of a table that are `first` or larger, in order of appearance."""
    found = [
        ids[ids >= first].astype(np.int64)
        for chunk in table.select_columns(["input_ids"]).with_format("arrow").iter(CHUNK)
        for ids in [chunk["input_ids"].combine_chunks().flatten().to_numpy()]
    ]
    return np.concatenate(found) if found else np.empty(0, np.int64)
