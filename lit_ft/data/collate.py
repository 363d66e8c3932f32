"""Collation: lists of token ids become one padded or packed batch of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray

from lit_ft.compat.protocols import TokenBatch
from lit_ft.loss.targets import IGNORE_INDEX

Example = Mapping[str, Sequence[int]]  # and the text `origin`
Row = Sequence[Example]


class Collator:
    """Collate rows of examples into a batch.

    An example is `{"input_ids": [...], "labels": [...]}` with unshifted labels. A row is a list of
    examples that follow one another. The batch is a dict with B rows of T tokens:

    - `input_ids` [B, T]: token ids, padded on the right;
    - `labels` [B, T]: -100 on padding and on the first token of every example, because no token of
      the same example predicts it;
    - `position_ids` [B, T], only in packed batches: they restart at 0 with each example, and once
      more where padding begins. From the restarts, transformers builds the mask that keeps
      examples apart, if it is given neither an attention_mask nor a cache (call the model with
      use_cache=False);
    - `attention_mask` [B, T], only in unpacked batches with padding: 1 on tokens, 0 on padding;
    - `num_tokens`: the number of tokens that are not padding;
    - `num_targets`: the number of labels that are not -100;
    - `origins`: the places of the examples in their sources, if each example has an `origin`.

    If the rows hold no tokens, the batch is a dummy: one short row that counts no tokens and no
    targets, so that a rank without work stays in step with the others.

    Args:
        pad_token_id: The token id that fills `input_ids` after the end of a row.
        packed: Whether to always include `position_ids`. Otherwise they are included only if a row
            holds several examples.
        pad_to_multiple_of: The divisor of the row length T, in tokens: T is rounded up to a
            multiple of it.

    Raises:
        ValueError: If `pad_to_multiple_of` is below 1.
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
        """Return the batch of `rows`, as the class describes it.

        Raises:
            ValueError: If an example has more or fewer labels than input ids.
        """
        examples = list(chain.from_iterable(rows))
        lengths = np.array([len(example["input_ids"]) for example in examples], dtype=np.int64)
        if not lengths.any():
            return self._dummy()
        # `add.reduceat` cannot sum an empty row.
        row_ends = np.cumsum([len(row) for row in rows])
        row_lengths = np.diff(np.concatenate(([0], lengths.cumsum()))[row_ends], prepend=0)

        starts = (lengths.cumsum() - lengths).repeat(lengths)  # where each token's example starts
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
        if all("origin" in example for example in examples):
            batch["origins"] = [str(example["origin"]) for example in examples]
        return batch

    def _width(self, tokens: int) -> int:
        return -(-tokens // self.pad_to_multiple_of) * self.pad_to_multiple_of

    def _dummy(self) -> TokenBatch:
        # Two tokens, so that the shifted labels are not empty. No attention_mask, because a row
        # that attends to no token would take a softmax over nothing.
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
    """Write `tokens` where `is_token` [B, T] is True, and `padding` elsewhere."""
    filled = np.empty(is_token.shape, dtype=np.int64)
    filled[:] = padding
    filled[is_token] = tokens
    return torch.from_numpy(filled)
