"""Split one or more sources into training and validation examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from math import ceil, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lit_ft.compat import remedies
from lit_ft.compat.refusal import Refusal
from lit_ft.data.encoded import EncodingReport
from lit_ft.data.encoding import Encoder
from lit_ft.data.formats import Format, named
from lit_ft.data.mixing import mix, side, split
from lit_ft.data.sources import EMBEDDED, Source, open_source, parse
from lit_ft.data.tables import (
    drop_unusable,
    encode_rows,
    encode_source,
    nothing_left,
    report,
    stream_source,
)

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


@dataclass(frozen=True)
class WeightedSource:
    """A source, the format of its rows, and its weight in a mixture.

    Args:
        source: The source of the rows.
        format: The format that reads the rows; None detects it from the keys of the first row.
        weight: The positive weight of the source, relative to the others.
        label: A short name, by which it is told from the other sources.
    """

    source: Source
    format: Format | None = None
    weight: float = 1.0
    label: str = ""

    def table(self, encoder: Encoder) -> Dataset:
        """Return the table of the source, from the cache if it is there."""
        return encode_source(self.source, self.format, encoder)


@dataclass(frozen=True)
class Splits:
    """The examples to train on and to validate on.

    Args:
        train: The mixed training examples, as a table or a stream.
        val: The table of validation examples. Each example occurs once.
        val_sources: The number of the training source of each validation example, [rows]; 0 if the
            validation examples have a source of their own.
        reports: The counts of the rows of each split, keyed by "train" and "val". The counts of a
            stream grow while it is read.
    """

    train: Dataset | IterableDataset
    val: Dataset
    val_sources: NDArray[np.int64]
    reports: dict[str, EncodingReport] = field(default_factory=dict)


def source_choices(
    path: str | None,
    sources: Sequence[Mapping[str, Any]] | None,
    options: Mapping[str, Any] | None = None,
) -> list[Mapping[str, Any]]:
    """Return the training sources in the form that `weighted_sources` takes.

    Args:
        path: The path of the training source, if there is only one.
        sources: The training sources, in the form that `weighted_sources` takes; None uses the one
            at `path`.
        options: The options of the source at `path`.

    Raises:
        ValueError: If both one source and several are given.
    """
    if sources is None:
        return [{"path": path, **(options or {})}]
    if path not in (None, EMBEDDED) or options:
        raise ValueError("give either sources or path (with source_options), not both")
    return list(sources)


def weighted_sources(
    choices: Iterable[Mapping[str, Any]], *, format: Format | str | None, streaming: bool = False
) -> list[WeightedSource]:
    """Open the sources of a mixture without reading them.

    Args:
        choices: The sources, each as `{path, weight?, format?, ...}`; other entries are passed to
            `open_source`.
        format: The format of sources that name none, as an object or a name such as "alpaca"; None
            detects it from the keys of each source's first row.
        streaming: Whether to stream datasets from the Hugging Face Hub.

    Raises:
        ValueError: If there is no source, if a source has no path, is unknown or occurs twice, or
            if a weight is not positive.
    """
    sources = []
    seen: list[dict[str, Any]] = []
    for choice in choices:
        options = dict(choice)
        weight, own_format = options.pop("weight", 1.0), options.pop("format", None) or format
        path = options.get("path")
        if path is None:
            raise Refusal("a source has no path", remedies.OWN_DATA)
        if not isinstance(path, str):
            raise ValueError(f"the path of a source must be text, not {path}")
        if isinstance(own_format, str):
            own_format = named(own_format)
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not (is_number and weight > 0 and isfinite(weight)):
            raise ValueError(f"the weight of {path} must be positive, not {weight}")
        if (rows := rows_of_choice(choice)) in seen:
            raise ValueError(f"{path} is among the sources twice: raise its weight instead")
        seen.append(rows)
        source = open_source(options.pop("path"), streaming=streaming, **options)
        sources.append(WeightedSource(source, own_format, weight))
    if not sources:
        raise ValueError("give at least one source")
    labels = _labels(seen)
    return [replace(one, label=label) for one, label in zip(sources, labels, strict=True)]


def _labels(choices: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the shortest kind of name that tells the sources apart: of their files, if it does.

    >>> _labels([{"path": "a/x.jsonl"}, {"path": "hub/b"}])
    ['x.jsonl', 'b']
    >>> _labels([{"path": "a/x.jsonl"}, {"path": "b/x.jsonl"}])
    ['a/x.jsonl', 'b/x.jsonl']
    >>> _labels([{"path": "p", "kind": "function"}, {"path": "p", "kind": "class"}])
    ['p kind=function', 'p kind=class']
    """
    paths = [str(choice["path"]) for choice in choices]
    full = [
        " ".join([path, *(f"{name}={value}" for name, value in choice.items() if name != "path")])
        for path, choice in zip(paths, choices, strict=True)
    ]
    kinds = ([Path(path).name for path in paths], paths, full)
    return next(labels for labels in kinds if len(set(labels)) == len(labels))


def rows_of_choice(choice: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a source that determine its rows: all but `weight` and `format`."""
    rows = {name: value for name, value in choice.items() if name not in ("weight", "format")}
    local = Path(str(rows.get("path"))).expanduser()
    return {**rows, "path": str(local.resolve())} if local.exists() else rows


def load_tables(
    train: Sequence[WeightedSource],
    val: WeightedSource | None,
    encoder: Encoder,
    *,
    val_fraction: float,
    seed: int,
) -> Splits:
    """Encode, split and mix the sources.

    Args:
        train: The sources to train on.
        val: The source to validate on; None splits each of the training sources.
        encoder: The encoder of the rows.
        val_fraction: The fraction of each source's rows to validate on, between 0 and 1. It is used
            if `val` is None and the source has no split of its own.
        seed: The seed of the mixture.

    Raises:
        ValueError: If a row cannot be read, or if a training source or the validation data gives no
            example.
    """
    tables = [one.table(encoder) for one in train]
    if val is None:
        sides = [split(table, val_fraction=val_fraction) for table in tables]
        kept, held_out = [one[0] for one in sides], [one[1] for one in sides]
    else:
        kept = [side(table, held_out=False) for table in tables]
        held_out = [side(val.table(encoder), held_out=True)]
    reports = [report(table) for table in kept]
    for one, counts in zip(train, reports, strict=True):
        if not counts.examples:
            raise nothing_left(counts, f"training on {one.source.name}")
    usable = [drop_unusable(table) for table in kept]
    return Splits(
        train=mix(usable, [one.weight for one in train], seed=seed),
        **_validation(held_out),
        reports={"train": sum(reports, EncodingReport()), "val": _count(held_out)},
    )


def open_streams(
    train: Sequence[WeightedSource],
    val: WeightedSource | None,
    encoder: Encoder,
    *,
    val_rows: int | None,
    seed: int,
) -> Splits:
    """Open and mix the sources as streams.

    If `val` is None, the first rows are validated on, and training leaves them out.

    Args:
        train: The sources to train on.
        val: The source to validate on; None takes the first rows of the training sources.
        encoder: The encoder of the rows.
        val_rows: The number of rows to validate on, over all sources together. Each source gives an
            equal part of them, rounded up. The number is used if `val` is None.
        seed: The seed of the mixture.

    Raises:
        ValueError: If a row to validate on cannot be read, or if no validation example is left.
    """
    reports = {"train": EncodingReport()}

    def tally(counts: EncodingReport) -> None:
        reports["train"] += counts

    skip = 0
    if val is not None:
        held_out = [side(val.table(encoder), held_out=True)]
    else:
        assert val_rows is not None
        skip = ceil(val_rows / len(train))
        first = [
            islice(parse(one.source, one.format, keep_errors=encoder.bad_rows == "skip"), skip)
            for one in train
        ]
        held_out = [encode_rows(rows, encoder) for rows in first]
    streams = [
        stream_source(one.source, one.format, encoder, skip=skip, tally=tally) for one in train
    ]
    reports["val"] = _count(held_out)
    mixed = mix(streams, [one.weight for one in train], seed=seed)
    return Splits(train=mixed, **_validation(held_out), reports=reports)


def _count(tables: Iterable[Dataset]) -> EncodingReport:
    return sum(map(report, tables), EncodingReport())


def _validation(tables: list[Dataset]) -> dict[str, Any]:
    """Return the fields `val` and `val_sources` of the splits."""
    from datasets import concatenate_datasets

    if not (counts := _count(tables)).examples:
        raise nothing_left(counts, "validation")
    usable = [drop_unusable(table) for table in tables]
    numbers = np.repeat(np.arange(len(usable)), [len(table) for table in usable])
    return {"val": concatenate_datasets(usable), "val_sources": numbers}
