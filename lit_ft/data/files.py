"""Readers of local files, one for each suffix; they also give the place of every row.

Each reader yields pairs (origin, row) in the order of the file. A line of JSON that cannot be read
is yielded as its error, and the next line is read. Any other error is raised, with a message that
starts with the name of the file.
"""

from __future__ import annotations

import csv
import errno
import io
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from lit_ft.data.formats import Row
from lit_ft.data.json_values import Marked, RepeatedKey, decoded, repeated_key_in

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
EXPANSION = 200
"""How many times its size a compressed file may have in memory or on disk, if it is large."""

EXPANDED_BYTES = 1 << 30
"""The size up to which any expansion is read."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


_NOT_FILES = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def other_than_file(path: Path) -> str | None:
    """Return what a path is if it is not an ordinary file, without opening it; None if it is one.

    Opening a FIFO waits for a writer, and a device may have no end.

    Raises:
        OSError: If nothing is known about the path, such as for lack of a right.
    """
    try:
        return _NOT_FILES.get(stat.S_IFMT(path.stat().st_mode))
    except (FileNotFoundError, NotADirectoryError):
        return "a link to nothing" if path.is_symlink() else "missing"
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "a loop of links"
        raise


def kind_of(file: Path) -> str:
    """Return the suffix that chooses a file's reader, without the suffix of a compression."""
    compressed = file.suffix.lower() in COMPRESSIONS
    return (file.with_suffix("") if compressed else file).suffix.lower()


def read(file: Path) -> Iterator[tuple[str, Row | ValueError]]:
    """Yield the origin and the fields of every row of a file whose kind is in `READERS`.

    A line of JSON that cannot be read, and a row that is not an object, are yielded as errors.

    Raises:
        ValueError: If the file has no rows, or if it cannot be read to its end. The message names
            the file.
    """
    origin = None
    for origin, row in READERS[kind_of(file)](file):
        if isinstance(row, dict | ValueError):
            yield origin, row
        else:
            yield origin, ValueError(f"a row must be an object, not {type(row).__name__}")
    if origin is None:
        raise ValueError(f"{file}: the file has no rows")


def num_rows(file: Path) -> int | None:
    """Return the number of rows of a large file, without reading them; None where it is unknown.

    Lines are counted for JSON lines, blank ones included.
    """
    if file.suffix.lower() == ".parquet":
        from pyarrow.parquet import read_metadata

        return int(read_metadata(file).num_rows)
    if file.suffix.lower() != ".jsonl":
        return None
    lines, last = 0, b"\n"
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            lines += block.count(b"\n")
            last = block[-1:]
    return lines + (last != b"\n")


class _Expanding(io.RawIOBase):
    """Reads a compressed file, unless it expands beyond what a text can.

    A small file may hold a line that fills the memory.
    """

    def __init__(self, raw: Any, file: Path) -> None:
        self._raw, self._file = raw, file
        self._left = max(EXPANDED_BYTES, EXPANSION * file.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = int(self._raw.readinto(buffer))
        self._left -= count
        if self._left < 0:
            raise ValueError(
                f"{self._file}: expands to more than {EXPANSION} times its size, which a text "
                "hardly does. If you trust it, expand it yourself."
            )
        return count


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    """Open a file for reading in binary mode, decompressed."""
    compression = COMPRESSIONS.get(file.suffix.lower())
    if compression is None:
        with file.open("rb") as stream:
            yield stream
        return
    from pyarrow import input_stream

    try:
        with input_stream(str(file), compression=compression) as raw:
            yield cast(BinaryIO, io.BufferedReader(_Expanding(raw, file), 1 << 16))
    except OSError as error:
        raise ValueError(f"{file}: cannot be decompressed: {error}") from error


def read_json_lines(file: Path) -> Iterator[tuple[str, object]]:
    """Yield the JSON object of each UTF-8 line; ignore blank lines, CRLF and a byte order mark."""
    with _opened(file) as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if line.strip():
                yield f"{file}:{number}", decoded(line)


def read_json(file: Path) -> Iterator[tuple[str, object]]:
    """Yield the rows of a JSON file, read whole unless it holds JSON lines.

    The file may hold an array of rows, one object with the rows under a key, one object with a list
    for each column, one row, or JSON lines.
    """
    with _opened(file) as stream:
        first = stream.readline().removeprefix(BYTE_ORDER_MARK).strip()
        while not first and (line := stream.readline()):
            first = line.strip()
        is_lines = first.startswith(b"{") and isinstance(decoded(first), dict | RepeatedKey)
        is_lines = is_lines and any(line.strip() for line in stream)
    if is_lines:
        yield from read_json_lines(file)
        return
    with _opened(file) as stream:
        text = stream.read().removeprefix(BYTE_ORDER_MARK)
    value = decoded(text)
    if isinstance(value, RepeatedKey):
        yield from _rows_around_repeated_keys(text, file)
        return
    if isinstance(value, ValueError):
        if first.startswith(b"{"):  # JSON lines whose first line is broken
            yield from read_json_lines(file)
            return
        raise ValueError(f"{file}: {value}") from value
    yield from _rows_of_value(value, file)


def _rows_around_repeated_keys(text: bytes, file: Path) -> Iterator[tuple[str, object]]:
    """Yield the rows of a JSON file, with an error in place of each that has a key twice.

    Raises:
        ValueError: If the object around all rows has a key twice.
    """
    value = decoded(text, mark=True)
    if isinstance(value, Marked | ValueError):
        raise ValueError(f"{file}: {value.error if isinstance(value, Marked) else value}")
    for origin, row in _rows_of_value(value, file):
        yield origin, repeated_key_in(row) or row


def _rows_of_value(value: object, file: Path) -> Iterator[tuple[str, object]]:
    """Yield the rows of a file that holds an array, an object, or a single value."""
    if isinstance(value, dict):
        yield from _rows_of_object(value, file)
        return
    for number, row in enumerate(value if isinstance(value, list) else [value], start=1):
        yield f"{file} row {number}", row


def _rows_of_object(value: dict[str, Any], file: Path) -> Iterator[tuple[str, object]]:
    """Yield the rows of a file that holds a single object."""
    lists = {key: rows for key, rows in value.items() if isinstance(rows, list)}
    rows_under = [
        key
        for key, rows in lists.items()
        if rows and all(isinstance(row, dict) and not {"role", "from"} & row.keys() for row in rows)
    ]
    if len(rows_under) == 1 and rows_under[0] not in ("segments", "tools"):
        for number, row in enumerate(value[rows_under[0]], start=1):
            yield f"{file} {rows_under[0]}[{number - 1}]", row
    elif len(lists) == len(value) and not any(
        isinstance(entry, dict) for column in lists.values() for entry in column
    ):
        lengths = {key: len(column) for key, column in lists.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"{file}: the columns differ in length: {lengths}")
        for number, row in enumerate(zip(*lists.values(), strict=True), start=1):
            yield f"{file} row {number}", dict(zip(lists, row, strict=True))
    else:
        yield f"{file} row 1", value


def read_text(file: Path) -> Iterator[tuple[str, object]]:
    """Yield a UTF-8 text file as one row `{text}`."""
    with _opened(file) as stream:
        try:
            text = stream.read().removeprefix(BYTE_ORDER_MARK).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not UTF-8 ({error.reason}); save it as UTF-8") from error
    if text.strip():
        yield str(file), {"text": text}


def read_csv(file: Path, *, delimiter: str = ",") -> Iterator[tuple[str, object]]:
    """Yield the rows of a UTF-8 CSV file with a header line; all values stay strings.

    The standard library reads the file, because `datasets` reads it with pandas, which guesses
    types. An answer such as `007` or `NA`, or an empty one, must stay as it is.
    """
    csv.field_size_limit(sys.maxsize)  # the default refuses answers over 128 KiB
    with _opened(file) as binary:
        stream = io.TextIOWrapper(binary, encoding="utf-8-sig", newline="")
        rows = csv.DictReader(stream, strict=True, delimiter=delimiter)
        try:
            names = rows.fieldnames or []
            if len(set(names)) < len(names):
                raise ValueError(
                    f"{file}: two columns have the same name, in {', '.join(names)}; rename one"
                )
            for row in rows:
                origin = f"{file}:{rows.line_num}"
                if None in row or None in row.values():
                    yield origin, ValueError("the row and the header line differ in length")
                else:
                    yield origin, row
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not UTF-8 ({error.reason}); save it as UTF-8") from error
        except csv.Error as error:
            raise ValueError(f"{file}:{rows.reader.line_num}: not valid CSV: {error}") from error


def read_parquet(file: Path) -> Iterator[tuple[str, object]]:
    """Yield the rows of an Apache Parquet file, with one batch of them in memory at a time."""
    # Not through `datasets`, which reads [ and * in a path as patterns.
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file} row {number}", without_nulls(row)
    except (ArrowException, OSError, ValueError, LookupError) as error:  # text, time zones, ...
        raise ValueError(f"{file}: not a readable parquet file: {error}") from error


def without_nulls(row: Row) -> Row:
    """Return a row of a table without the nulls inside its objects.

    In a table, all objects of a column have the same keys, with null where the original object had
    no such key. Without this function, a tool call would be learnt with the arguments of the calls
    in other rows.
    """
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


READERS: dict[str, Callable[[Path], Iterator[tuple[str, object]]]] = {
    ".jsonl": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": partial(read_csv, delimiter="\t"),
    ".parquet": read_parquet,
    ".txt": read_text,
}
