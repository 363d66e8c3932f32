"""How much time and memory does a step take with GaLore, AdamW, LoRA and galore-torch?

    python benchmarks/optimizer_step.py            # both sizes, on the CPU
    python benchmarks/optimizer_step.py --size wide --steps 12
    python benchmarks/optimizer_step.py --device cuda --dtype bfloat16 --size four_of_8b

All that a step needs is timed: forward, loss, backward, optimizer, fold, rotation, the move of the
bases, head and embedding. All methods use lit_ft's chunked loss; galore-torch's SVD is timed apart.
Each method has a process of its own, as it has for its user: in a shared process it would find
memory that another method has mapped. It takes turns, step by step, with a process of AdamW; more
than two would leave too little memory.

Results: results/optimizer_step.json for a CPU run of all sizes and methods,
results/optimizer_step_cuda.json for any run on a GPU; other runs are written only with --output.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from support.arguments import script_parser
from support.new_basis import measure_refresh
from support.own_process import OwnProcess
from support.results import RESULTS, this_run, write_json
from support.sides import METHODS, SIZES, Side, Step
from support.timing import median_ratio, spread

ON_CPU = ("wide", "smollm2")


def main() -> None:
    """Measure, print, and write the results; on the CPU only if nothing was left out."""
    options = _parser().parse_args()
    dtype = getattr(torch, options.dtype)
    record = {**this_run(), "steps": options.steps, "dtype": options.dtype, "sizes": {}}
    for size in options.size:
        measured = measure(size, options.steps, options.only, options.device, dtype)
        record["sizes"][size] = measured
        Console().print(table(size, measured))
    record["refresh"] = refresh = measure_refresh(torch.device(options.device))
    Console().print({name: f"{seconds:.4f} s" for name, seconds in refresh.items()})
    whole = set(options.only) == set(METHODS) and set(options.size) >= set(ON_CPU)
    if whole or options.device != "cpu" or options.output != RESULTS:
        name = "optimizer_step" if options.device == "cpu" else f"optimizer_step_{options.device}"
        write_json(options.output / f"{name}.json", record)


def measure(
    size: str, steps: int, methods: Sequence[str], device: str, dtype: torch.dtype
) -> dict[str, Any]:
    """Pair each method with AdamW; the first three steps of each are not timed."""
    found: dict[str, Any] = {}
    for name in track([name for name in METHODS if name in methods and name != "adamw"], size):
        with (
            OwnProcess(Side, "adamw", size, device, dtype) as adamw,
            OwnProcess(Side, name, size, device, dtype) as method,
        ):
            pair = {"adamw": adamw, name: method}
            _alternate(pair, 3)
            for process in pair.values():
                process.call(Side.reset_peak)
            taken = _alternate(pair, steps)
            for side, process in pair.items():
                found[side] = {
                    **_figures(taken[side], taken["adamw"]),
                    "bytes_beside_weights": process.call(Side.bytes_beside_weights),
                    "peak_bytes": process.call(Side.peak_bytes),
                }
            found[name]["adamw_beside_it"] = found["adamw"]["median"]
            print(f"{name} {found[name]['median']:.4f} s, adamw {found['adamw']['median']:.4f} s")
    return found


def _alternate(pair: Mapping[str, OwnProcess], steps: int) -> dict[str, list[Step]]:
    taken: dict[str, list[Step]] = {side: [] for side in pair}
    for _ in range(steps):
        for side, process in pair.items():
            taken[side].append(process.call(Side.step))
    return taken


def _figures(steps: list[Step], of_adamw: list[Step]) -> dict[str, float]:
    seconds = [step.seconds for step in steps]
    figures = spread(seconds)
    adamw = [step.seconds for step in of_adamw]
    figures["times_faster_than_adamw"] = median_ratio(adamw, seconds)
    refreshes = [step.seconds for step in steps if step.refreshed]
    others = [step.seconds for step in steps if not step.refreshed]
    if refreshes and others:
        ratio = statistics.median(refreshes) / statistics.median(others)
        figures["refresh_step_over_others"] = ratio
    return figures


def table(size: str, measured: dict[str, Any]) -> Table:
    """Lay the figures out."""
    shown = Table(
        "method",
        "s a step",
        "min – max",
        "× adamw",
        "refresh step / others",
        "MiB without weights",
        "peak MiB",
        title=size,
    )
    for method, row in measured.items():
        shown.add_row(
            method,
            f"{row['median']:.3f}",
            f"{row['min']:.3f} – {row['max']:.3f}",
            f"{row['times_faster_than_adamw']:.3f}",
            f"{row['refresh_step_over_others']:.3f}" if "refresh_step_over_others" in row else "",
            f"{row['bytes_beside_weights'] / 2**20:,.0f}",
            f"{row['peak_bytes'] / 2**20:,.0f}",
        )
    return shown


def _parser() -> argparse.ArgumentParser:
    parser = script_parser(__doc__)
    parser.add_argument(
        "--size", nargs="*", choices=SIZES, default=list(ON_CPU), help="models to measure on"
    )
    parser.add_argument(
        "--only", nargs="*", choices=METHODS, default=METHODS, help="methods to compare with adamw"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it runs")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of the weights"
    )
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each method")
    return parser


if __name__ == "__main__":
    main()
