"""Collation: lists of token ids become one padded or packed batch of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray

from lit_ft.compat.protocols import TokenBatch
from lit_ft.loss.targets import IGNORE_INDEX

Example = Mapping[str, Sequence[int]]
Row = Sequence[Example]


class Collator:
    """Collate rows of examples into a batch.

    An example is `{"input_ids": [...], "labels": [...]}` with unshifted labels; a row is a list of
    examples that lie behind each other. The batch is a dict of

    - `input_ids` [B, T], padded on the right;
    - `labels` [B, T]: -100 on padding and on the first token of every example, which nothing of
      its own example predicts;
    - `position_ids` [B, T], in packed batches only: restart at 0 with each example, and once more
      where padding begins. From restarts transformers builds the mask that keeps examples apart,
      given neither an attention_mask nor a cache (call the model with use_cache=False);
    - `attention_mask` [B, T], in unpacked batches that contain padding only: 1 real, 0 padding;
    - `num_tokens`: tokens that are not padding; `num_targets`: labels that are not -100.

    No rows at all give a dummy of one short row without tokens or targets to count, so that a
    rank without work keeps step with the others.

    Args:
        pad_token_id: Fills `input_ids` behind a row.
        packed: Always give `position_ids`; otherwise only if a row has several examples.
        pad_to_multiple_of: T is a multiple of this.
    """

    def __init__(
        self, pad_token_id: int, *, packed: bool = False, pad_to_multiple_of: int = 1
    ) -> None:
        if pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of must be at least 1, got {pad_to_multiple_of}.")
        self.pad_token_id = pad_token_id
        self.packed = packed
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, rows: Sequence[Row]) -> TokenBatch:
        """Collate; see the class.

        Raises:
            ValueError: If an example has not as many labels as input ids.
        """
        examples = list(chain.from_iterable(rows))
        lengths = np.array([len(example["input_ids"]) for example in examples], dtype=np.int64)
        if not lengths.any():
            return self._dummy()
        # `add.reduceat` cannot sum the nothing of an empty row.
        row_ends = np.cumsum([len(row) for row in rows])
        row_lengths = np.diff(np.concatenate(([0], lengths.cumsum()))[row_ends], prepend=0)

        starts = (lengths.cumsum() - lengths).repeat(lengths)  # of each token's example
        offsets = np.arange(len(starts)) - starts
        labels = _flatten(examples, "labels", lengths)
        labels[offsets == 0] = IGNORE_INDEX

        columns = np.arange(self._width(int(row_lengths.max())))
        is_token = columns < row_lengths[:, None]
        batch: TokenBatch = {
            "input_ids": _fill(
                is_token, _flatten(examples, "input_ids", lengths), self.pad_token_id
            ),
            "labels": _fill(is_token, labels, IGNORE_INDEX),
        }
        if self.packed or any(len(row) > 1 for row in rows):
            batch["position_ids"] = _fill(is_token, offsets, columns - row_lengths[:, None])
        elif not is_token.all():
            batch["attention_mask"] = torch.from_numpy(is_token.astype(np.int64))
        batch["num_tokens"] = int(lengths.sum())
        batch["num_targets"] = int((labels != IGNORE_INDEX).sum())
        return batch

    def _width(self, tokens: int) -> int:
        return -(-tokens // self.pad_to_multiple_of) * self.pad_to_multiple_of

    def _dummy(self) -> TokenBatch:
        # Two tokens, so that the shifted labels are not empty; no attention_mask, because a row
        # that attends to nothing is a softmax over nothing.
        width = self._width(2)
        batch: TokenBatch = {
            "input_ids": torch.full((1, width), self.pad_token_id),
            "labels": torch.full((1, width), IGNORE_INDEX),
            "num_tokens": 0,
            "num_targets": 0,
        }
        if self.packed:
            batch["position_ids"] = torch.arange(width)[None]
        return batch


def _flatten(examples: list[Example], key: str, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Concatenate one field of all examples, [tokens]."""
    for example, length in zip(examples, lengths, strict=True):
        if len(example[key]) != length:
            raise ValueError(
                f"An example has {length} input_ids and {len(example[key])} {key}: "
                "there must be one label for each token."
            )
    return np.concatenate([np.asarray(example[key], dtype=np.int64) for example in examples])


def _fill(
    is_token: NDArray[np.bool_], tokens: NDArray[np.int64], padding: int | NDArray[np.int64]
) -> torch.Tensor:
    """Spread tokens over the True places of is_token [B, T], padding over the others."""
    filled = np.empty(is_token.shape, dtype=np.int64)
    filled[:] = padding
    filled[is_token] = tokens
    return torch.from_numpy(filled)
