"""Encoded rows as tables, and what is done with tables: split, choose, mix, put into bins.

A table is a `datasets.Dataset` of `EncodedRow`s, memory-mapped from the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset as TorchDataset

from lit_ft.data.cache import cache_key, cached
from lit_ft.data.encoding import EncodedRow, Encoder, EncodingReport
from lit_ft.data.formats import Format
from lit_ft.data.rows import ParsedRow
from lit_ft.data.sources import Source, parse

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

TENSOR_COLUMNS = ["input_ids", "labels"]
REPORT_COLUMNS = ["num_tokens", "num_targets", "truncated", "overlong"]
STREAM_CHUNK = 32  # rows encoded at once
SPLIT_SEED = 0  # no setting, so that runs with other seeds validate on the same examples


def encode_source(source: Source, format: Format | None, encoder: Encoder) -> Dataset:
    """Return the table of a source, from the cache if nothing that shaped it has changed.

    Raises:
        ValueError: Naming the row that cannot be read or encoded.
    """
    key = cache_key(source, format, encoder)

    def build(scratch: Path) -> Dataset:
        return _table(encoder(parse(source, format)), scratch, key)

    return cached(key, build)


def encode_rows(rows: Iterable[ParsedRow], encoder: Encoder) -> Dataset:
    """Return the table of a few rows, in memory."""
    from datasets import Dataset

    return Dataset.from_list([row._asdict() for row in encoder(rows)], features=_features())


def stream_source(
    source: Source,
    format: Format | None,
    encoder: Encoder,
    *,
    skip: int,
    tally: Callable[[EncodingReport], None],
) -> IterableDataset:
    """Return the examples of a source, encoded while they are read; its state can be saved.

    Args:
        source: Gives the rows.
        format: Reads them; None detects it from the first row.
        encoder: Encodes them.
        skip: How many rows to leave out at the start.
        tally: Called with the counts of every few rows, those that make no example among them.

    Raises:
        ValueError: While it is read: naming the row that cannot be read or encoded, or if a whole
            pass gives no example.
    """
    from datasets import IterableDataset

    seen = EncodingReport()

    def rows() -> Iterator[dict[str, Any]]:
        # Without this, a trainer would pass over a stream of no example for ever.
        if seen != EncodingReport():
            refuse_nothing(seen, f"training on {source.name}")
        count = 0
        for row in parse(source, format):
            count += 1
            yield row._asdict()
        if count <= skip:
            raise ValueError(
                f"{source.name} has {count} rows, and the first {skip} are validated on: "
                "lower data.max_val_examples, or give data.val_path"
            )

    def encode(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
        nonlocal seen
        parsed = (ParsedRow(*values) for values in zip(*columns.values(), strict=True))
        encoded = list(encoder(parsed))
        counts = EncodingReport.of(**{name: _array(encoded, name) for name in REPORT_COLUMNS})
        seen += counts
        tally(counts)
        kept = [row for row in encoded if row.num_targets]
        return {name: [getattr(row, name) for row in kept] for name in TENSOR_COLUMNS}

    stream = IterableDataset.from_generator(rows).skip(skip)
    return stream.map(
        encode, batched=True, batch_size=STREAM_CHUNK, remove_columns=list(ParsedRow._fields)
    )


def refuse_nothing(report: EncodingReport, purpose: str) -> None:
    """Raise ValueError with the counts and the remedy if a report has no example."""
    if report.examples:
        return
    remedy = "give more data"
    if report.dropped_overlong:
        remedy = "raise data.max_length, or cut the rows with data.drop_overlong=false"
    elif report.dropped_without_targets:
        remedy = "raise data.max_length if answers are cut off, or add assistant turns"
    raise ValueError(f"nothing is left for {purpose} ({report}): {remedy}")


def report(table: Dataset) -> EncodingReport:
    """Count a table's rows."""
    return EncodingReport.of(**{name: column(table, name) for name in REPORT_COLUMNS})


def column(table: Dataset, name: str) -> NDArray[Any]:
    """Return a column of numbers, [rows]."""
    # Said aloud, since numpy would take floats for the type of no rows.
    return np.asarray(table.with_format("numpy")[name][:], dtype=table.features[name].dtype)


def drop_unusable(table: Dataset) -> Dataset:
    """Leave out the rows that make no example."""
    return table.select(np.flatnonzero(column(table, "num_targets") > 0))


def split(table: Dataset, *, val_fraction: float) -> tuple[Dataset, Dataset]:
    """Split a table into a training and a validation side.

    A source that holds rows out itself is obeyed. Otherwise a row's side depends on its place in
    the source alone, so that neither a seed nor rows appended to a file move other rows. Both
    sides get an example at least, if there are two.
    """
    if _splits_itself(table):
        return side(table, held_out=False), side(table, held_out=True)
    usable = column(table, "num_targets") > 0
    drawn = _draw(len(table), usable=usable, share=val_fraction)
    return table.select(np.flatnonzero(~drawn)), table.select(np.flatnonzero(drawn))


def side(table: Dataset, *, held_out: bool) -> Dataset:
    """Return the rows on one side of the source's own split; all if it has none."""
    if not _splits_itself(table):
        return table
    return table.select(np.flatnonzero(column(table, "held_out") == held_out))


def subset(table: Dataset, size: int | None) -> Dataset:
    """Return so many rows, chosen at random once and for all, in their order; all if None."""
    if size is None or size >= len(table):
        return table
    chosen = np.argsort(_random(len(table)), kind="stable")[:size]
    return table.select(np.sort(chosen))


def mix(tables: Sequence[Any], weights: Sequence[float], *, seed: int) -> Any:
    """Interleave tables or streams, drawing the next example from each with its weight's share.

    The mixture ends when every table has been seen whole (`all_exhausted` in `datasets`): no
    example is left out, and those of a table small for its weight occur several times an epoch.
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
    """Rows of a batch: the examples that lie behind each other in each.

    Args:
        table: The examples.
        bins: The indices of the examples in each row; None for one example a row.
    """

    def __init__(self, table: Dataset, bins: list[list[int]] | None = None) -> None:
        self.examples = table.select_columns(TENSOR_COLUMNS).with_format("numpy")
        self.bins = bins or [[index] for index in range(len(table))]
        lengths = column(table, "num_tokens")
        self.lengths = [int(lengths[indices].sum()) for indices in self.bins]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.bins)

    def __getitem__(self, index: int) -> list[dict[str, NDArray[np.int64]]]:
        """Return the examples of a row."""
        return [self.examples[place] for place in self.bins[index]]


def _splits_itself(table: Dataset) -> bool:
    return len(table) > 0 and table[0]["held_out"] is not None


def _draw(rows: int, *, usable: NDArray[Any], share: float) -> NDArray[np.bool_]:
    """Draw a share of rows by their places; of the usable ones never none or all, if avoidable."""
    numbers = _random(rows)
    drawn: NDArray[np.bool_] = numbers < int(share * 2**64)
    places = np.flatnonzero(usable)
    if len(places) > 1:
        places = places[np.argsort(numbers[places], kind="stable")]
        drawn[places[0]], drawn[places[-1]] = True, False
    return drawn


def _random(rows: int) -> NDArray[np.uint64]:
    # numpy keeps the stream of a bit generator over its versions, not so that of other methods.
    return np.random.PCG64(SPLIT_SEED).random_raw(rows)


def _array(rows: Sequence[EncodedRow], name: str) -> NDArray[Any]:
    return np.array([getattr(row, name) for row in rows])


def _table(rows: Iterable[EncodedRow], scratch: Path, key: str) -> Dataset:
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        return Dataset.from_generator(
            lambda: (row._asdict() for row in rows),
            features=_features(),
            cache_dir=str(scratch),
            fingerprint=key,
        )
    except DatasetGenerationError as error:
        # The cause is what the user must read.
        raise error.__cause__ or error from None


def _features() -> Any:
    from datasets import Features, List, Value

    return Features(
        {
            "origin": Value("string"),
            "input_ids": List(Value("int32")),
            "labels": List(Value("int32")),
            "num_tokens": Value("int32"),
            "num_targets": Value("int32"),
            "truncated": Value("bool"),
            "overlong": Value("bool"),
            "prompt": List({"role": Value("string"), "content": Value("string")}),
            "held_out": Value("bool"),
        }
    )
