"""Count the work in a batch: its tokens, targets, squared lengths and rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor


@dataclass
class BatchCounts:
    """The amount of work in one or more batches. Counts may be tensors on any device.

    Attributes:
        tokens: The number of tokens that are not padding.
        targets: The number of target tokens, over which the loss is summed.
        squared_lengths: The sum of length² over the sequences, in tokens².
        samples: The number of rows.
    """

    tokens: int | Tensor = 0
    targets: int | Tensor = 0
    squared_lengths: int | Tensor = 0
    samples: int | Tensor = 0

    def __add__(self, other: BatchCounts) -> BatchCounts:
        """Add the counts field by field."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return BatchCounts(*(a + b for a, b in pairs))


def count_tokens(batch: Any) -> int | Tensor:
    """Return the number of tokens in a batch that are not padding.

    Raises:
        MisconfigurationException: If the batch is not a mapping with `num_tokens`,
            `attention_mask` [B, T] or `input_ids` [B, T].
    """
    if isinstance(batch, Mapping):
        if "num_tokens" in batch:
            return batch["num_tokens"]  # type: ignore[no-any-return]
        if "attention_mask" in batch:
            return batch["attention_mask"].sum()  # type: ignore[no-any-return]
        if "input_ids" in batch:
            return batch["input_ids"].numel()  # type: ignore[no-any-return]
    raise MisconfigurationException(
        f"ThroughputMonitor cannot count the tokens of a {type(batch).__name__}: the batch needs "
        "'num_tokens', 'attention_mask' or 'input_ids', or pass ThroughputMonitor(num_tokens=...), "
        "a function from batch to int."
    )


def num_samples(batch: Any) -> int:
    """Return the number of rows of a batch."""
    if isinstance(batch, Mapping) and "input_ids" in batch:
        return len(batch["input_ids"])
    return extract_batch_size(batch)


def sum_squared_lengths(batch: Mapping[str, Any]) -> int | Tensor:
    """Return the sum of length² over the sequences; attention's cost is proportional to it.

    Lengths are counted from the first of `position_ids`, `attention_mask` and `input_ids` [B, T]
    that the batch has. A batch with none of them gives 0.
    """
    if "position_ids" in batch:
        # 1 + 3 + 5 + ... over the positions of a sequence is its length squared.
        return (2 * batch["position_ids"] + 1).sum()  # type: ignore[no-any-return]
    if "attention_mask" in batch:
        return (batch["attention_mask"].sum(1) ** 2).sum()  # type: ignore[no-any-return]
    if "input_ids" in batch:
        rows, length = batch["input_ids"].shape
        return int(rows * length**2)
    return 0
