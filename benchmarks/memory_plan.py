"""How far is the memory plan of a run from the memory that the run takes?

    python benchmarks/memory_plan.py
    python benchmarks/memory_plan.py --cells 'gemma3 * layerwise*'
    python benchmarks/memory_plan.py --replan

A cell is one set of arguments. `python -m lit_ft.plan` plans it, and `python train.py` runs it. A
library in front of malloc counts what torch's CPU allocator has in use, over all threads, and a
callback reads the peak from ahead of the model to the end of the last validation. The plan and the
count know nothing of each other. Of several ranks, the one that takes most counts. The data are
texts of data.max_length tokens, a third of them a token shorter: every token is learnt, and some
batch holds padding, as a plan assumes. In the cells `unpadded` all texts are longer than
data.max_length, and no batch needs a mask. The script needs Linux and a C compiler.

Cells that are in the results are kept and not run again; --replan plans them again and keeps what
was measured.

Results: results/memory_plan.json, results/memory_plan.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from support.arguments import script_parser
from support.counted import compiled_counter
from support.memory_cells import CELLS, rows_of, settings_of
from support.preloaded import CommandFailed, run_python
from support.results import ROOT, this_run, write_json

BOUNDS = (-0.005, 0.04)  # of planned / measured - 1


def main() -> None:
    options = _parser().parse_args()
    torch.set_num_threads(1)
    results = options.output / "memory_plan.json"
    record = json.loads(results.read_text()) if results.is_file() else {}
    cells: dict[str, dict[str, Any]] = record.get("cells", {})
    asked = [name for name in CELLS if fnmatch(name, options.cells)]
    failed = []
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True)) as shown:
        prepare_environment(Path(folder))
        data = Path(folder) / "rows.jsonl"
        task = shown.add_task("cells", total=len(asked))
        for name in asked:
            shown.update(task, description=name)
            data.write_text("".join(json.dumps(row) + "\n" for row in rows_of(name)))
            try:
                cells[name] = both(cells.get(name, {}), settings_of(name), data, options.replan)
            except CommandFailed as error:
                failed.append(name)
                shown.console.print(f"{name}\n{error}", markup=False, highlight=False)
                continue
            found = {**this_run(), "bounds": BOUNDS, **summary(cells), "cells": in_order(cells)}
            write_json(results, found)
            (options.output / "memory_plan.md").write_text(as_markdown(found), encoding="utf-8")
            shown.console.print(f"{_error(cells[name]):+7.2%}  {name}", highlight=False)
            shown.advance(task)
    if failed:
        sys.exit(f"{len(failed)} cells failed: {', '.join(failed)}")


def prepare_environment(folder: Path) -> None:
    """Let all later processes, and the ranks that they start, count what torch allocates."""
    counter = compiled_counter(folder)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "LD_PRELOAD": str(counter)}


def both(known: dict[str, Any], arguments: list[str], data: Path, replan: bool) -> dict[str, Any]:
    """Return what is known of a cell, with its plan and its measurement."""
    if known.get("arguments") != arguments:
        known = {"arguments": arguments}
    if "measured_bytes" not in known:
        known = known | measured(arguments, data)
    if replan or "planned_bytes" not in known:
        known = known | planned(arguments, data)
    return known


def measured(arguments: list[str], data: Path) -> dict[str, Any]:
    """Return the most bytes in use in the run: of each rank, and of the one that takes most."""
    with tempfile.TemporaryDirectory() as folder:
        probe = ["trusted_packages=[support]"]
        probe += ["+callbacks.peak._target_=support.peak_probe.PeakProbe"]
        probe += [f"+callbacks.peak.folder={folder}"]
        command = ["train.py", *arguments, f"data.path={data}", *probe, f"run_dir={folder}/run"]
        run_python(command)
        ranks = [json.loads(file.read_text()) for file in sorted(Path(folder).glob("rank_*.json"))]
    most = max(ranks, key=lambda rank: max(rank["peaks"].values()))
    return {
        "measured_bytes": max(most["peaks"].values()),
        "measured_by_part": most["peaks"],
        "measured_by_rank": [max(rank["peaks"].values()) for rank in ranks],
        "measured_at": this_run()["commit"],
    }


def planned(arguments: list[str], data: Path) -> dict[str, Any]:
    """Return the peak of the plan."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        plan = ["-m", "lit_ft.plan", *arguments, f"data.path={data}"]
        run_python([*plan, "--no-savings", "--json", str(file)])
        found = json.loads(file.read_text())
    return {
        "planned_bytes": found["peak_bytes"],
        "planned_by_phase": {one: sum(held.values()) for one, held in found["by_phase"].items()},
        "planned_at": this_run()["commit"],
    }


def _error(cell: Mapping[str, Any]) -> float:
    error: float = cell["planned_bytes"] / cell["measured_bytes"] - 1
    return error


def in_order(cells: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the cells from the one that is planned lowest to the one that is planned highest."""
    return {name: cells[name] for name in sorted(cells, key=lambda name: _error(cells[name]))}


def summary(cells: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the median and the range of the errors, and the cells outside of the bounds."""
    errors = {name: _error(cell) for name, cell in cells.items()}
    return {
        "number": len(errors),
        "median_of_absolute_errors": statistics.median(map(abs, errors.values())),
        "lowest_error": min(errors.values()),
        "highest_error": max(errors.values()),
        "misses": sorted(n for n, e in errors.items() if not BOUNDS[0] <= e <= BOUNDS[1]),
    }


def as_markdown(found: Mapping[str, Any]) -> str:
    """Return the results as a page."""
    rows = [
        f"| {name} | {cell['planned_bytes'] / 2**20:,.2f} | {cell['measured_bytes'] / 2**20:,.2f} "
        f"| {_error(cell):+.2%} | {'' if name not in found['misses'] else 'miss'} |"
        for name, cell in found["cells"].items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    low, high = found["bounds"]
    return "\n".join(
        [
            "# The memory plan against real runs",
            "",
            f"{found['number']} runs of `train.py`. The median of the absolute errors is "
            f"{found['median_of_absolute_errors']:.3%}; the errors lie between "
            f"{found['lowest_error']:+.2%} and {found['highest_error']:+.2%}. "
            f"{len(found['misses'])} of them are outside of {low:+.1%} to {high:+.0%}.",
            "",
            "Measured is the most memory that torch's CPU allocator had in use at once in the "
            "whole run, its validations, samples and checkpoints included. fsdp2 means FSDP2 on 2 "
            "ranks, and unpadded means that all rows are full. "
            "[memory_plan.json](memory_plan.json) has the arguments of each run.",
            "",
            "| Run | Planned MiB | Measured MiB | Error | |",
            "| --- | ---: | ---: | ---: | --- |",
            *rows,
            "",
            f"- Hardware: {found['hardware']['cpu']}, {found['threads']} thread",
            f"- Versions: {versions}",
            f"- Date and commit: {found['date']}, {found['commit']}",
            f"- Command: `{found['command']}`",
            "",
        ]
    )


def _parser() -> argparse.ArgumentParser:
    parser = script_parser(__doc__)
    parser.add_argument(
        "--cells",
        default="*",
        metavar="PATTERN",
        help="the cells to run, such as 'llama * adamw *'",
    )
    parser.add_argument(
        "--replan", action="store_true", help="plan again, and keep what was measured"
    )
    return parser


if __name__ == "__main__":
    main()
