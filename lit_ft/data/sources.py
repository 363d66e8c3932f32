"""Where rows come from: the embedded data, local files, or a Hugging Face dataset."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from lit_ft.compat import remedies
from lit_ft.compat.refusal import Refusal, Remedy, located
from lit_ft.data.docstrings import Docstrings
from lit_ft.data.files import READERS, kind_of, num_rows, other_than_file, read, without_nulls
from lit_ft.data.formats import Format, Row, available, detect
from lit_ft.data.rows import WHOLE, ParsedRow, Part, SourceRow
from lit_ft.storage.hub import offline_if_unreachable, why_unreachable

EMBEDDED = "python-docstrings"
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
SPLIT_NAME = re.compile(r"(^|[-_.])(train|test|valid|validation|val|dev)([-_.]|$)", re.IGNORECASE)


class Source(Protocol):
    """A place that yields rows in a fixed order."""

    name: str
    """The name that the user gave the source."""

    def rows(self) -> Iterator[SourceRow]:
        """Yield every row; a row that cannot be read holds its error in place of its fields."""
        ...

    def identity(self) -> dict[str, object]:
        """Return the JSON values that determine the rows, from which the cache key is made."""
        ...


def open_source(path: str, *, streaming: bool = False, **options: Any) -> Source:
    """Return the source that a path names, without reading it.

    Args:
        path: `python-docstrings` (the embedded data); a .jsonl, .json, .csv, .tsv, .parquet or
            .txt file, also compressed (.gz, .zst); a folder of these files; or the name of a
            Hugging Face dataset, which may also be a local folder laid out as on the hub.
        streaming: Whether to read a hub dataset over the network while training, rather than
            download it first.
        **options: Options of `Docstrings` for the embedded data, or of `datasets.load_dataset`
            (such as `name`, `split` and `revision`) for a hub dataset. With options, a local folder
            is read as a hub dataset.

    Raises:
        ValueError: If there is no such source, or if it does not take the options.
    """
    local = Path(path).expanduser()
    if path == EMBEDDED:
        try:
            return Docstrings(**options)
        except TypeError as error:
            raise ValueError(f"{path} does not take the options {sorted(options)}") from error
    kind = other_than_file(local)
    if kind is None:
        if options:
            raise ValueError(f"{path} is a file and takes no options, but got {sorted(options)}")
        return Files(path, [local])
    if kind == "a folder" and not options:
        files, others = _data_files(local)
        if files:
            if unread := _unread(local, files):
                raise Refusal(
                    f"{path}: files in subfolders, archives and backups would not be read "
                    f"({', '.join(unread[:3])})",
                    Remedy("unpack them next to the others"),
                    Remedy("move them out of the folder"),
                    remedies.THROUGH_DATASETS,
                )
            return Files(path, files, others)
        if others or kind_of(local) in READERS:
            found = f"only {', '.join(others)}" if others else "nothing that can be read"
            raise ValueError(f"{path} is a folder that holds {found}: give a file, or its folder")
    if kind not in ("a folder", "missing"):
        raise ValueError(f"{path} is {kind}, not a file: give a file with the rows")
    if kind == "missing" and (not HUB_NAME.fullmatch(path) or kind_of(local) in READERS):
        raise ValueError(f"{path}: no such file{_near(local)}")
    return Hub(path, streaming=streaming, **options)


def parse(
    source: Source,
    format: Format | None = None,
    *,
    keep_errors: bool = False,
    part: Part = WHOLE,
) -> Iterator[ParsedRow]:
    """Yield the rows of a source, as their format reads them.

    Args:
        source: The source of the rows.
        format: The format that reads the rows; None detects it from the keys of the first row.
        keep_errors: Whether a row that cannot be read or does not fit the format is yielded with
            its error as its content. Otherwise the error is raised.
        part: The rows to yield. Those before them only tell the format.

    Raises:
        ValueError: If a row cannot be read or does not fit the format, and `keep_errors` is false;
            the message names the row. Also if the source cannot be read to its end.
    """
    is_detected = False
    for number, row in enumerate(islice(source.rows(), part.last)):
        if number < part.first and format is not None:
            continue
        try:
            if isinstance(row.fields, ValueError):
                raise row.fields
            if format is None:
                format, is_detected = detect(row.fields), True
            elif is_detected and (other := _other_format(format, row.fields)) is not None:
                raise other
            content = format.parse(row.fields)
            unread = getattr(format, "unread", None)
            keys = tuple(unread(row.fields)) if unread else ()
        except ValueError as error:
            if not keep_errors:
                raise located(error, row.origin) from error
            parsed = ParsedRow(row.origin, error, row.held_out)
        else:
            parsed = ParsedRow(row.origin, content, row.held_out, keys)
        if number >= part.first:
            yield parsed


def _other_format(format: Format, row: Row) -> Refusal | None:
    """Return the error for a row that has another format than those before it."""
    if format.matches(row):
        return None
    other = next((kind for kind in (kind() for kind in available()) if kind.matches(row)), None)
    if other is None:
        return None
    return Refusal(
        f"the row is in the format {type(other).__name__} {other.wants}, and those before it are "
        f"in the format {type(format).__name__} {format.wants}",
        Remedy("keep rows of one format in a file or folder"),
        remedies.SEVERAL_SOURCES,
    )


class Files:
    """Local files, read one after another.

    Args:
        name: The name that the user gave the files.
        files: The existing files to read; each suffix chooses a reader.
        others: What has the name of a data file next to them and is none, such as `b.jsonl (a
            FIFO)`. It is not read.

    Raises:
        ValueError: If no reader knows a suffix, or if the files look like the splits of one
            dataset, whose test part must not be trained on.
    """

    def __init__(self, name: str, files: list[Path], others: Sequence[str] = ()) -> None:
        for file in files:
            if kind_of(file) not in READERS:
                known = ", ".join(READERS)
                raise ValueError(f"{file}: unknown file type {file.suffix!r}; known are {known}")
        splits = [file.name for file in files if SPLIT_NAME.search(file.stem)]
        if len(files) > 1 and splits:
            raise Refusal(
                f"{name} holds the splits of a dataset ({', '.join(splits)})",
                remedies.TWO_FILES,
                remedies.THROUGH_DATASETS,
            )
        self.name = name
        self.files = files
        self.others = tuple(others)

    def rows(self) -> Iterator[SourceRow]:
        """Yield the rows file by file; their origins name the file, and the line or the row."""
        for file in self.files:
            for origin, fields in read(file):
                yield SourceRow(origin, fields)

    def num_rows(self) -> int | None:
        """Return the number of rows without reading them; None where it is unknown."""
        counts = [num_rows(file) for file in self.files]
        return None if None in counts else sum(filter(None, counts))

    def identity(self) -> dict[str, object]:
        """Return the names of the files and the digests of their contents."""
        digests = []
        for file in self.files:
            with file.open("rb") as stream:
                digests.append((str(file), hashlib.file_digest(stream, "sha256").hexdigest()))
        return {"source": type(self).__name__, "files": digests}


class Hub:
    """A dataset on the hub, or in a local folder that `datasets.load_dataset` can read.

    Args:
        path: The name of the dataset on the hub, or a local folder.
        split: The split to read, or a slice of a split, such as `train[:10%]`.
        streaming: Whether to read over the network while training, rather than download first.
        **options: Options of `datasets.load_dataset`, such as `name` (the configuration) or
            `revision`.
    """

    def __init__(
        self, path: str, *, split: str = "train", streaming: bool = False, **options: Any
    ) -> None:
        self.name = path
        self.split = split
        self.streaming = streaming
        self.options = options
        self._dataset: Any = None

    def rows(self) -> Iterator[SourceRow]:
        """Yield the rows of the split; their origins are `name[split] row 57`."""
        for number, fields in enumerate(self._load(), start=1):
            origin = f"{self.name}[{self.split}] row {number}"
            yield SourceRow(origin, without_nulls(fields))

    def num_rows(self) -> int | None:
        """Return the number of rows of the split; None for a stream."""
        return None if self.streaming else len(self._load())

    def identity(self) -> dict[str, object]:
        """Return the name, split, options and fingerprint, which depends on the hub's revision."""
        options = {key: str(value) for key, value in self.options.items()}
        fingerprint = None if self.streaming else self._load()._fingerprint
        return {
            "source": type(self).__name__,
            "name": self.name,
            "split": self.split,
            "options": options,
            "fingerprint": fingerprint,
        }

    def _load(self) -> Any:
        if self._dataset is None:
            from datasets import load_dataset

            is_local = Path(self.name).is_dir()
            try:
                with nullcontext() if is_local else offline_if_unreachable():
                    self._dataset = load_dataset(
                        self.name, split=self.split, streaming=self.streaming, **self.options
                    )
            except Exception as error:  # from the library, fsspec, pyarrow or the network
                if not is_local and (why := why_unreachable()) is not None:
                    raise ValueError(
                        f"{self.name}: neither a local file nor a dataset in the cache, and the "
                        f"hub cannot be reached ({why}). Give a file, or connect to the hub."
                    ) from error
                raise ValueError(
                    f"{self.name}: neither a local file nor a dataset that can be loaded "
                    f"({type(error).__name__}: {error}). A private dataset needs `hf auth login`."
                ) from error
        return self._dataset


def _data_files(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the data files in a folder, and what has the name of one and is something else."""
    named = sorted(f for f in folder.iterdir() if kind_of(f) in READERS and not _is_notice(f))
    kinds = {file: other_than_file(file) for file in named}
    files = [file for file, kind in kinds.items() if kind is None]
    return files, [f"{file.name} ({kind})" for file, kind in kinds.items() if kind is not None]


def _unread(folder: Path, files: list[Path]) -> list[str]:
    """Return the data files in a folder that are not among `files`."""
    return [
        name
        for file in sorted(set(folder.rglob("*")) - set(files))
        if not (name := file.relative_to(folder).as_posix()).startswith(".")
        and not READERS.keys().isdisjoint(map(str.lower, file.suffixes))
        and not _is_notice(file)
        and file.is_file()
    ]


def _is_notice(file: Path) -> bool:
    """Whether a file is a text about the data in its folder, such as a readme."""
    return file.suffix == ".txt" and file.stem.lower() in ("readme", "license", "licence", "notice")


def _near(missing: Path) -> str:
    siblings = [file.name for file in missing.parent.iterdir()] if missing.parent.is_dir() else []
    close = get_close_matches(missing.name, siblings, n=1)
    return f"; did you mean {missing.parent / close[0]}?" if close else ""
