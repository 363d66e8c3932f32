"""Readers of local files, one for each suffix, that name the place of every row.

Each reader yields pairs (origin, row) in the file's order. Every error about a file's content is a
ValueError that starts with the origin, such as `my.jsonl:57`.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from lit_ft.data.formats import Row

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read(file: Path) -> Iterator[tuple[str, Row]]:
    """Yield the origin and the fields of every row of a file whose suffix is in `READERS`.

    Raises:
        ValueError: If a row cannot be read or is not an object with named fields, or if the file
            has no rows. Names the file and the row.
    """
    origin = None
    for origin, row in READERS[file.suffix.lower()](file):
        if not isinstance(row, dict):
            raise ValueError(f"{origin}: a row must be an object, not {type(row).__name__}")
        yield origin, row
    if origin is None:
        raise ValueError(f"{file}: the file has no rows")


def read_json_lines(file: Path) -> Iterator[tuple[str, object]]:
    """Yield the JSON object of each UTF-8 line; ignore blank lines, CRLF and a byte order mark."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if line.strip():
                origin = f"{file}:{number}"
                yield origin, _decode(line, origin)


def read_json(file: Path) -> Iterator[tuple[str, object]]:
    """Yield the objects of a JSON array, read whole. Other files are read as JSON lines."""
    with file.open("rb") as stream:
        start = stream.read(4096).removeprefix(BYTE_ORDER_MARK).lstrip()
    if not start.startswith(b"["):
        yield from read_json_lines(file)
        return
    rows = _decode(file.read_bytes().removeprefix(BYTE_ORDER_MARK), str(file))
    assert isinstance(rows, list)
    for number, row in enumerate(rows, start=1):
        yield f"{file} row {number}", row


def read_csv(file: Path) -> Iterator[tuple[str, object]]:
    """Yield the rows of UTF-8 comma-separated values under a header line; all stay strings.

    The standard library reads them and not `datasets`, in which pandas guesses the types: an
    answer such as `007`, `NA` or an empty one must stay as it is.
    """
    csv.field_size_limit(sys.maxsize)  # the default refuses answers over 128 KiB
    with file.open(encoding="utf-8-sig", newline="") as stream:
        rows = csv.DictReader(stream, strict=True)
        try:
            names = rows.fieldnames or []
            if len(set(names)) < len(names):
                raise ValueError(
                    f"{file}: two columns have the same name, in {', '.join(names)}; rename one"
                )
            for row in rows:
                origin = f"{file}:{rows.line_num}"
                if None in row or None in row.values():
                    raise ValueError(f"{origin}: the row and the header line differ in length")
                yield origin, row
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not UTF-8 ({error.reason}); save it as UTF-8") from error
        except csv.Error as error:
            raise ValueError(f"{file}:{rows.reader.line_num}: not valid CSV: {error}") from error


def read_parquet(file: Path) -> Iterator[tuple[str, object]]:
    """Yield the rows of an Apache Parquet file, a batch of rows in memory at a time."""
    # Not through `datasets`, which reads [ and * in a path as patterns.
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file} row {number}", row
    except (ArrowException, OSError, ValueError, LookupError) as error:  # text, time zones, ...
        raise ValueError(f"{file}: not a readable parquet file: {error}") from error


def _decode(text: bytes, origin: str) -> object:
    try:
        value: object = json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        where = f"byte 0x{text[error.start]:02x} at column {error.start + 1}"
        raise ValueError(f"{origin}: not UTF-8 ({where}); save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{origin}: not valid JSON: {error}") from error
    if b"\\u" in text:
        # JSON allows half of a surrogate pair in an escape; UTF-8 and tokenizers do not.
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{origin}: holds half of a \\u surrogate pair; write both halves or remove it"
            ) from error
    return value


READERS: dict[str, Callable[[Path], Iterator[tuple[str, object]]]] = {
    ".jsonl": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
}
