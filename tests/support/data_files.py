"""Data files of every kind, written from rows."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow


def lines(rows: list[Any]) -> list[bytes]:
    return [json.dumps(row, ensure_ascii=False).encode() for row in rows]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as the file's suffix says."""
    if path.suffix == ".gz":
        plain = write(path.with_suffix(""), rows)
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    elif path.suffix == ".zst":
        plain = write(path.with_suffix(""), rows)
        with pyarrow.output_stream(str(path), compression="zstd") as stream:
            stream.write(plain.read_bytes())
        plain.unlink()
    elif path.suffix == ".jsonl":
        path.write_bytes(b"\n".join(lines(rows)))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as stream:
            delimiter = "\t" if path.suffix == ".tsv" else ","
            table = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
            table.writeheader()
            table.writerows(rows)
    else:
        from datasets import Dataset

        Dataset.from_list(rows).to_parquet(str(path))
    return path
