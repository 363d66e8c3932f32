"""How results are written: what a run ran on, and JSON that every parser reads."""

from __future__ import annotations

import datetime
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from lit_ft.measure.environment import hardware, versions

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def this_run() -> dict[str, Any]:
    """Return what every result says about its run: command, date, commit, threads, machine."""
    script = f"benchmarks/{Path(sys.argv[0]).name}"
    return {
        "command": shlex.join(["python", script, *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": _commit(),
        "threads": torch.get_num_threads(),
        "hardware": hardware(),
        "versions": versions(),
    }


def write_json(path: Path, record: Any) -> None:
    """Write a result and, where it is missing, its folder. NaN and infinity become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_dumps(record, indent=2) + "\n", encoding="utf-8")


def append_json_line(path: Path, record: Any) -> None:
    """Add a result as one line at the end of a file. NaN and infinity become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(_dumps(record) + "\n")


def read_json_lines(path: Path) -> list[Any]:
    """Return the results of a file that `append_json_line` writes; none where it is missing."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _dumps(record: Any, *, indent: int | None = None) -> str:
    # json's own default writes NaN as it is in Python, and only Python reads it again.
    return json.dumps(_finite(record), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _commit() -> str | None:
    """Return the commit that runs; None outside a git checkout."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
