"""How much time and memory does a step take with GaLore, AdamW, LoRA and galore-torch?

    python benchmarks/optimizer_step.py            # both sizes, on the CPU
    python benchmarks/optimizer_step.py --size wide --steps 12
    python benchmarks/optimizer_step.py --device cuda --dtype bfloat16 --size four_of_8b --profile

All that a step needs is timed: forward, loss, backward, optimizer, fold, rotation, the move of the
bases, head and embedding. All methods use lit_ft's chunked loss; galore-torch's SVD is timed apart.
Each method has a process of its own, as it has for its user: in a shared process it would find
memory that another method has mapped. It takes turns, step by step, with a process of AdamW; more
than two would leave too little memory.

Results: results/optimizer_step.json for a CPU run of all sizes and methods,
results/optimizer_step_cuda.json for any run on a GPU; other runs are written only with --output.
A run that is written is written after each method. With --profile, four more steps of each method
go into results/optimizer_step_cuda_profile.md.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Mapping
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
    record: dict[str, Any] = {**this_run(), "steps": options.steps, "dtype": options.dtype}
    record["sizes"] = {}
    whole = set(options.only) == set(METHODS) and set(options.size) >= set(ON_CPU)
    wanted = whole or options.device != "cpu" or options.output != RESULTS
    name = "optimizer_step" if options.device == "cpu" else f"optimizer_step_{options.device}"
    profiles: dict[str, str] = {}
    for size in options.size:
        record["sizes"][size] = measured = {}
        for found in measure(size, options, profiles):
            measured |= found
            if wanted:
                write_json(options.output / f"{name}.json", record)
            if wanted and options.profile:
                page = as_markdown(record, profiles)
                (options.output / f"{name}_profile.md").write_text(page, encoding="utf-8")
        Console().print(table(size, measured))
    if options.size == ["tiny"]:
        return  # a basis of full size would take longer than all else
    record["refresh"] = refresh = measure_refresh(torch.device(options.device))
    Console().print({name: f"{seconds:.4f} s" for name, seconds in refresh.items()})
    if wanted:
        write_json(options.output / f"{name}.json", record)


def measure(
    size: str, options: argparse.Namespace, profiles: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """Pair each method with AdamW and yield both; the first three steps of each are not timed.

    Args:
        size: The name of the size.
        options: The options of the command.
        profiles: Takes the profile of each method, if profiles are wanted.
    """
    dtype = getattr(torch, options.dtype)
    wanted = [name for name in METHODS if name in options.only and name != "adamw"]
    for name in track(wanted, size):
        with (
            OwnProcess(Side, "adamw", size, options.device, dtype) as adamw,
            OwnProcess(Side, name, size, options.device, dtype) as method,
        ):
            pair = {"adamw": adamw, name: method}
            _alternate(pair, 3)
            for process in pair.values():
                process.call(Side.reset_peak)
            taken = _alternate(pair, options.steps)
            found: dict[str, Any] = {}
            for side, process in pair.items():
                found[side] = {
                    **_figures(taken[side], taken["adamw"]),
                    "bytes_beside_weights": process.call(Side.bytes_beside_weights),
                    "peak_bytes": process.call(Side.peak_bytes),
                }
                if options.profile:
                    profiles[f"{size}, {side}"] = process.call(Side.profiled)
        found[name]["adamw_beside_it"] = found["adamw"]["median"]
        print(f"{name} {found[name]['median']:.4f} s, adamw {found['adamw']['median']:.4f} s")
        yield found


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


def as_markdown(record: Mapping[str, Any], profiles: Mapping[str, str]) -> str:
    """Return the profiles as a page."""
    where = ", ".join(record["hardware"]["gpus"]) or record["hardware"]["cpu"]
    said = f"Four steps of each method, {record['dtype']}, {where}, torch "
    said += f"{record['versions']['torch']}, {record['date']}, commit {record['commit']}."
    parts = (f"## {name}\n\n```text\n{tables}\n```\n" for name, tables in profiles.items())
    return "\n".join(["# Profiles of optimizer_step.py", "", said, "", *parts])


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
    parser.add_argument("--profile", action="store_true", help="write where the time goes, too")
    return parser


if __name__ == "__main__":
    main()
