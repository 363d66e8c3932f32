"""Encoded rows as tables and streams, and counts of the rows that were used, cut or dropped.

A table is a `datasets.Dataset` of `EncodedRow`s, memory-mapped from the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lit_ft.compat import remedies
from lit_ft.compat.refusal import Refusal, Remedy
from lit_ft.data.cache import cache_key, cached
from lit_ft.data.encoded import REPORT_COLUMNS, EncodedRow, EncodingReport
from lit_ft.data.encoding import Encoder
from lit_ft.data.formats import Format
from lit_ft.data.notes import count
from lit_ft.data.parts import parts_of, work_on
from lit_ft.data.rows import WHOLE, ParsedRow, Part
from lit_ft.data.sources import Source, parse
from lit_ft.terminal import stage

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

EXAMPLE_COLUMNS = ["input_ids", "labels", "origin"]
STREAM_CHUNK = 32  # rows encoded at once
WRITTEN_AT_ONCE = 256  # rows


def encode_source(source: Source, format: Format | None, encoder: Encoder) -> Dataset:
    """Return the table of a source, from the cache if nothing that determines it has changed.

    Several processes encode a large source; see `lit_ft.data.parts`.

    Raises:
        ValueError: If a row cannot be read or encoded. The message names the row.
    """
    key = cache_key(source, format, encoder)

    def build(scratch: Path) -> Dataset:
        return _table(source, format, encoder, scratch)

    return cached(key, build)


def encode_rows(rows: Iterable[ParsedRow], encoder: Encoder) -> Dataset:
    """Return the table of a few rows, held in memory."""
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
    """Return the examples of a source as a stream that encodes while it is read.

    The state of the stream can be saved.

    Args:
        source: The source of the rows.
        format: The format that reads the rows; None detects it from the keys of the first row.
        encoder: The encoder of the rows.
        skip: The number of rows to leave out at the start.
        tally: The function that is called with the counts of every few rows, including rows that
            give no example.

    Raises:
        ValueError: While the stream is read, if a row cannot be read or encoded (the message names
            the row), if no row is left after `skip`, or if a whole pass gives no example.
    """
    from datasets import IterableDataset

    seen = EncodingReport()

    def rows() -> Iterator[dict[str, Any]]:
        # Without this, a trainer would read a stream without examples forever.
        if seen != EncodingReport() and not seen.examples:
            raise nothing_left(seen, f"training on {source.name}")
        count = 0
        for row in _parsed(source, format, encoder):
            count += 1
            yield {"row": row}
        if count <= skip:
            raise Refusal(
                f"{source.name} has {count} rows, and the first {skip} are used for validation",
                remedies.VALIDATE_ON_LESS,
                remedies.VALIDATE_ELSEWHERE,
            )

    def encode(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
        nonlocal seen
        encoded = list(encoder(columns["row"]))
        counts = EncodingReport.of_rows(encoded)
        seen += counts
        tally(counts)
        kept = [row for row in encoded if row.num_targets]
        return {name: [getattr(row, name) for row in kept] for name in EXAMPLE_COLUMNS}

    stream = IterableDataset.from_generator(rows).skip(skip)
    return stream.map(encode, batched=True, batch_size=STREAM_CHUNK, remove_columns=["row"])


def nothing_left(report: EncodingReport, purpose: str) -> Refusal:
    """Return the error for rows that give no example, with their counts and the remedies."""
    ways = [Remedy("give more data")]
    if report.dropped_overlong:
        ways = [remedies.LONGER_ROWS, remedies.CUT_ROWS, remedies.SPLIT_ROWS]
    elif report.dropped_without_targets:
        ways = [remedies.LONGER_ROWS, Remedy("add assistant turns")]
    return Refusal(f"nothing is left for {purpose} ({report})", *ways)


def report(table: Dataset) -> EncodingReport:
    """Return the counts of a table's rows."""
    from pyarrow import compute

    told = table.select_columns(["origin", "notes", "error"]).with_format("arrow")[:]
    with_notes = told.filter(compute.greater(compute.list_value_length(told["notes"]), 0))
    with_errors = told.filter(compute.not_equal(told["error"], ""))
    return EncodingReport.of(
        **{name: column(table, name) for name in REPORT_COLUMNS},
        notes=count(with_notes["origin"].to_pylist(), with_notes["notes"].to_pylist()),
        errors=with_errors["error"].to_pylist(),
    )


def repeated(train: Dataset, val: Dataset | None = None) -> int:
    """Return the number of examples of `train` that repeat an earlier one.

    If `val` is given, return the number of examples of `val` that are also in `train`.
    """
    digests = column(train, "digest")
    if val is None:
        return len(digests) - len(np.unique(digests))
    return int(np.isin(column(val, "digest"), digests).sum())


def _parsed(
    source: Source, format: Format | None, encoder: Encoder, part: Part = WHOLE
) -> Iterator[ParsedRow]:
    return parse(source, format, keep_errors=encoder.bad_rows == "skip", part=part)


def column(table: Dataset, name: str) -> NDArray[Any]:
    """Return a column of numbers, [rows]."""
    # The type is explicit, because numpy would make an empty column float.
    return np.asarray(table.with_format("numpy")[name][:], dtype=table.features[name].dtype)


def drop_unusable(table: Dataset) -> Dataset:
    """Return the table without the rows that give no example."""
    return table.select(np.flatnonzero(column(table, "num_targets") > 0))


def _table(source: Source, format: Format | None, encoder: Encoder, scratch: Path) -> Dataset:
    from datasets import Dataset, concatenate_datasets
    from datasets.utils import tqdm

    def write(part: Part) -> Iterator[int]:
        return _write(encoder(_parsed(source, format, encoder, part)), file_of(part))

    def file_of(part: Part) -> Path:
        return scratch / f"{part.first}.arrow"

    scratch.mkdir()
    parts = parts_of(source)
    with stage("encoding the data"), tqdm(desc="Encoding", unit=" rows") as bar:
        for count in work_on(parts, write):
            bar.update(count)
    return concatenate_datasets([Dataset.from_file(str(file_of(part))) for part in parts])


def _write(rows: Iterator[EncodedRow], file: Path) -> Iterator[int]:
    """Write rows to a file as a table; yield the number of rows of each batch that is written."""
    import pyarrow

    schema = _features().arrow_schema
    with pyarrow.OSFile(str(file), "wb") as stream, pyarrow.ipc.new_stream(stream, schema) as out:
        while batch := [row._asdict() for row in islice(rows, WRITTEN_AT_ONCE)]:
            out.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema=schema))
            yield len(batch)


def _features() -> Any:
    from datasets import Features, List, Value

    return Features(
        {
            "origin": Value("string"),
            "input_ids": List(Value("int32")),
            "labels": List(Value("int32")),
            "num_tokens": Value("int32"),
            "row_tokens": Value("int32"),
            "num_targets": Value("int32"),
            "truncated": Value("bool"),
            "overlong": Value("bool"),
            "prompt": Value("string"),
            "held_out": Value("bool"),
            "notes": List(Value("string")),
            "error": Value("string"),
            "digest": Value("int64"),
        }
    )
