"""Readers of local files, one a suffix, that say where every row stands.

Each yields pairs (origin, row) in the file's order. The origin, `my.jsonl:57`, is what errors
quote; every complaint about a file's content is a ValueError that starts with it.
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
    """Yield the origin and the fields of every row of a file that `READERS` knows by its suffix.

    Raises ValueError, naming file and row, where a row cannot be read, is no object of named
    fields, or where there is none.
    """
    origin = None
    for origin, row in READERS[file.suffix.lower()](file):
        if not isinstance(row, dict):
            raise ValueError(f"{origin}: a row must be an object, not {type(row).__name__}")
        yield origin, row
    if origin is None:
        raise ValueError(f"{file}: there is no row in the file")


def read_json_lines(file: Path) -> Iterator[tuple[str, object]]:
    """One JSON object a line, in UTF-8; blank lines, CRLF and a byte order mark are no matter."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if line.strip():
                origin = f"{file}:{number}"
                yield origin, _decode(line, origin)


def read_json(file: Path) -> Iterator[tuple[str, object]]:
    """A JSON array of objects, read whole; a file that starts otherwise is read as JSON lines."""
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
    """Comma-separated values, in UTF-8, under a line of names; every value stays a string.

    Read by the standard library and not through `datasets`, whose types are guessed by pandas: an
    answer such as `007`, `NA` or an empty one must stay what it is.
    """
    csv.field_size_limit(sys.maxsize)  # the default refuses answers over 128 KiB
    with file.open(encoding="utf-8-sig", newline="") as stream:
        rows = csv.DictReader(stream, strict=True)
        try:
            names = rows.fieldnames or []
            if len(set(names)) < len(names):
                raise ValueError(f"{file}: two columns have one name, in {', '.join(names)}")
            for row in rows:
                origin = f"{file}:{rows.line_num}"
                if None in row or None in row.values():
                    raise ValueError(f"{origin}: the row and the line of names differ in length")
                yield origin, row
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not UTF-8 ({error.reason}); save it as UTF-8") from error
        except csv.Error as error:
            raise ValueError(f"{file}:{rows.reader.line_num}: not valid CSV: {error}") from error


def read_parquet(file: Path) -> Iterator[tuple[str, object]]:
    """Apache Parquet, streamed."""
    # Not through `datasets`, to which [ and * are patterns.
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
        # JSON allows half of a surrogate pair in an escape, UTF-8 and tokenizers do not.
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{origin}: holds half of a \\u surrogate pair") from error
    return value


READERS: dict[str, Callable[[Path], Iterator[tuple[str, object]]]] = {
    ".jsonl": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
}
