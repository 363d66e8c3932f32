"""Operations on tables of examples: split one, choose from one, mix several, and fill rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset as TorchDataset

from lit_ft.data.tables import EXAMPLE_COLUMNS, column

if TYPE_CHECKING:
    from datasets import Dataset

SPLIT_SEED = 0  # not a setting, so that runs with other seeds validate on the same examples


def split(table: Dataset, *, val_fraction: float) -> tuple[Dataset, Dataset]:
    """Split a table into a training and a validation side.

    If the source marks the rows for validation, the table is split by these marks. Otherwise the
    side of a row is drawn at random, and depends only on its place in the source. So neither a seed
    nor rows appended to a file move other rows to another side. Each side gets at least one
    example, if there are two.

    Args:
        table: The encoded rows of one source.
        val_fraction: The share of the rows to validate on, between 0 and 1. It is used if the
            source does not mark the rows for validation.
    """
    if _splits_itself(table):
        return side(table, held_out=False), side(table, held_out=True)
    usable = column(table, "num_targets") > 0
    drawn = _draw(len(table), usable=usable, share=val_fraction)
    return table.select(np.flatnonzero(~drawn)), table.select(np.flatnonzero(drawn))


def side(table: Dataset, *, held_out: bool) -> Dataset:
    """Return the rows on one side of the source's own split, or all rows if it has none."""
    if not _splits_itself(table):
        return table
    return table.select(np.flatnonzero(column(table, "held_out") == held_out))


def subset(table: Dataset, size: int | None) -> Dataset:
    """Return `size` rows in order, chosen at random but the same in every run; None takes all."""
    if size is None or size >= len(table):
        return table
    return table.select(chosen_places(len(table), size))


def chosen_places(rows: int, size: int | None) -> NDArray[np.int64]:
    """Return the places of the rows that `subset` chooses from a table of `rows` rows, in order."""
    if size is None or size >= rows:
        return np.arange(rows)
    return np.sort(np.argsort(_random(rows), kind="stable")[:size])


def mix(tables: Sequence[Any], weights: Sequence[float], *, seed: int) -> Any:
    """Interleave tables or streams, drawing each example from one of them by weight.

    The mixture ends when every table has been read completely (`all_exhausted` in `datasets`). No
    example is left out. The examples of a table that is small for its weight occur several times
    per epoch.

    Args:
        tables: The tables or streams to mix.
        weights: The positive weight of each table or stream, relative to the others.
        seed: The seed of the random draws.
    """
    if len(tables) == 1:
        return tables[0]
    from datasets import interleave_datasets

    return interleave_datasets(
        list(tables),
        probabilities=[weight / sum(weights) for weight in weights],
        seed=seed,
        stopping_strategy="all_exhausted",
    )


class Bins(TorchDataset[list[dict[str, NDArray[np.int64]]]]):
    """The rows that batches are made of, each with one or more examples in a sequence.

    Args:
        table: The table of examples.
        bins: The indices of the examples in each row; None puts one example in each row.
    """

    def __init__(self, table: Dataset, bins: list[list[int]] | None = None) -> None:
        self.examples = table.select_columns(EXAMPLE_COLUMNS).with_format("numpy")
        self.bins = bins or [[index] for index in range(len(table))]
        lengths = column(table, "num_tokens")
        self.lengths = [int(lengths[indices].sum()) for indices in self.bins]

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.bins)

    def __getitem__(self, index: int) -> list[dict[str, NDArray[np.int64]]]:
        """Return the examples of a row."""
        return [self.examples[place] for place in self.bins[index]]


def _splits_itself(table: Dataset) -> bool:
    return len(table) > 0 and table[0]["held_out"] is not None


def _draw(rows: int, *, usable: NDArray[Any], share: float) -> NDArray[np.bool_]:
    """Draw a share of the rows by their places; draw some, but not all, of several usable ones."""
    numbers = _random(rows)
    drawn: NDArray[np.bool_] = numbers < int(share * 2**64)
    places = np.flatnonzero(usable)
    if len(places) > 1:
        places = places[np.argsort(numbers[places], kind="stable")]
        drawn[places[0]], drawn[places[-1]] = True, False
    return drawn


def _random(rows: int) -> NDArray[np.uint64]:
    # numpy keeps the stream of a bit generator across versions, unlike that of other methods.
    return np.random.PCG64(SPLIT_SEED).random_raw(rows)
