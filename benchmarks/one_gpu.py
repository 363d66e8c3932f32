"""How much memory and time does a model of 1 to 8 billion weights take on one GPU?

    python benchmarks/one_gpu.py
    python benchmarks/one_gpu.py --group speed
    python benchmarks/one_gpu.py --cells 'llama_3_1_8b *'
    python benchmarks/one_gpu.py --device cpu --tiny --output build/tried

A cell is one set of arguments of `python train.py`. It takes 20 steps on rows of 2,048 tokens, a
third of them a token shorter, so that batches hold padding. The weights are random, in a published
shape, and are made on the GPU. Memory and time do not depend on their values; the losses mean
nothing here.

Measured is the peak of torch's memory on the GPU in training, weights included, and tokens a
second. Planned is what the run itself has planned while it loaded, or, if it ended before its plan
was there, what `python -m lit_ft.plan` says. The cells of the group `memory` may run several at a
time, because each process has its own peak. Their speed then means nothing, and is left out.

Results: results/one_gpu.json, after each cell; a run adds its cells to those that are there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from support.arguments import script_parser
from support.gpu_cells import GROUPS, rows, settings_of
from support.results import ROOT, this_run, write_json

from lit_ft.run.files import read_summary

_GIB = 1 << 30
_LARGEST_CELL = 45 * _GIB  # what the cell that takes most needs, with its CUDA context
_CORES_A_CELL = 4  # a run and its plan load libraries at the same time


def main() -> None:
    """Run the wanted cells, and add each to the results."""
    parser = _parser()
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA GPU: --device cpu --tiny tries the script out.")
    results = options.output / "one_gpu.json"
    found: dict[str, Any] = json.loads(results.read_text()) if results.is_file() else {}
    failed = []
    for group in options.group:
        asked = [cell for cell in GROUPS[group] if fnmatch(cell, options.cells)]
        at_once = _at_once(options.device) if group == "memory" else 1
        with ThreadPoolExecutor(at_once) as pool:
            running = {pool.submit(run, cell, options, alone=at_once == 1): cell for cell in asked}
            for one in as_completed(running):
                cell = running[one]
                found[cell] = one.result()
                write_json(results, found)
                failed += [cell] * (found[cell]["status"] != "completed")
                print(f"{found[cell]['status']}: {cell}", flush=True)
    Console().print(table(found))
    if failed:
        sys.exit(f"{len(failed)} cells failed: {', '.join(failed)}")


def _at_once(device: str) -> int:
    """Return how many cells may run at a time."""
    if device == "cpu":
        return 1
    memory = torch.cuda.get_device_properties(0).total_memory
    return max(1, min(memory // _LARGEST_CELL, (os.cpu_count() or 1) // _CORES_A_CELL))


def run(cell: str, options: argparse.Namespace, *, alone: bool) -> dict[str, Any]:
    """Return the figures of one cell; `status` and `error` say how a failed one ended."""
    arguments = settings_of(cell, device=options.device, tiny=options.tiny)
    with tempfile.TemporaryDirectory() as folder:
        data, run_dir = Path(folder) / "rows.jsonl", Path(folder) / "run"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows(tiny=options.tiny)))
        command = ["train.py", *arguments, f"data.path={data}", f"run_dir={run_dir}"]
        output = _python(command)
        summary = read_summary(run_dir) or {"status": "failed", "error": output[-2000:]}
        planned = (summary.get("planned_peak_bytes") or {}).get("value")
        if planned is None and summary["status"] == "completed":
            planned = _planned([*arguments, f"data.path={data}"], Path(folder) / "plan.json")
    kept = ["status", "error", "model", "peak_bytes", "optimizer_state_bytes", "seconds"]
    kept += ["tokens_per_second", "step_seconds"] * alone
    figures = {name: summary.get(name) for name in (*kept, "hardware", "versions")}
    told = {name: this_run()[name] for name in ("date", "commit")}
    return {**told, "planned_bytes": planned, **figures, "arguments": arguments}


def _planned(arguments: list[str], file: Path) -> int | None:
    output = _python(["-m", "lit_ft.plan", *arguments, "--no-savings", "--json", str(file)])
    if not file.is_file():
        print(output[-2000:])
        return None
    planned: int = json.loads(file.read_text())["peak_bytes"]
    return planned


def _python(arguments: list[str]) -> str:
    """Run `python ARGUMENTS`, and return what it printed."""
    command = [sys.executable, *arguments]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.run(command, cwd=ROOT, text=True, errors="replace", **streams).stdout


def table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """Lay the figures out, in GiB."""
    columns = ("cell", "planned GiB", "peak GiB", "error", "optimizer state", "tokens/s")
    shown = Table(*columns)
    for cell, row in found.items():
        if row["status"] != "completed":
            shown.add_row(cell, str(row["status"]))
            continue
        planned, peak = row["planned_bytes"], row["peak_bytes"]["value"]
        on_gpu = row["peak_bytes"]["source"] == "cuda_allocated"  # as planned: tensors alone
        speed = row.get("tokens_per_second")
        shown.add_row(
            cell,
            f"{planned / _GIB:.2f}" if planned else "",
            f"{peak / _GIB:.2f}",
            f"{planned / peak - 1:+.2%}" if planned and on_gpu else "",
            f"{row['optimizer_state_bytes'] / _GIB:.2f}",
            f"{speed:,.0f}" if speed else "",
        )
    return shown


def _parser() -> argparse.ArgumentParser:
    parser = script_parser(__doc__)
    parser.add_argument(
        "--group", nargs="*", choices=GROUPS, default=list(GROUPS), help="groups of cells to run"
    )
    parser.add_argument(
        "--cells", default="*", metavar="PATTERN", help="the cells to run, such as '* lora *'"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="where it runs")
    parser.add_argument(
        "--tiny", action="store_true", help="shrink the models and the rows, to try the script out"
    )
    return parser


if __name__ == "__main__":
    main()
