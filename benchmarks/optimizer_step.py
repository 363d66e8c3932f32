"""Time and memory of a training step: subspace training against AdamW, LoRA and galore-torch.

    python benchmarks/optimizer_step.py            # both sizes
    python benchmarks/optimizer_step.py --size wide --steps 12
    python benchmarks/optimizer_step.py --device cuda --dtype bfloat16 --size four_of_8b

Everything that a step needs is timed: forward, loss, backward, optimizer, fold, rotation, tracking,
head and embedding. All sides use lit_ft's chunked loss; galore-torch's SVD is timed apart. Each
method has a process of its own, as it has for its user, and steps in turn with AdamW's: what one
side frees, another in the same process would find mapped already, and more than two leave too
little memory to be at ease.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from support.new_basis import measure_refresh
from support.sides import METHODS, SIZES, Side, Step

from lit_ft.measure import peak_bytes, reset_peak
from lit_ft.run.summary import hardware, versions

RESULTS = Path(__file__).parent / "results"
ON_CPU = ("wide", "smollm2")


def main() -> None:
    """Measure, print, and write the results: on the CPU, if nothing was left out."""
    options = _parser().parse_args()
    dtype = getattr(torch, options.dtype)
    record: dict[str, Any] = {"steps": options.steps, "dtype": options.dtype}
    record |= {"hardware": hardware(), "versions": versions(), "sizes": {}}
    for size in options.size:
        measured = measure(size, options.steps, options.only, options.device, dtype)
        record["sizes"][size] = measured
        Console().print(table(size, measured))
    record["refresh"] = refresh = measure_refresh(torch.device(options.device))
    Console().print({name: f"{seconds:.4f} s" for name, seconds in refresh.items()})
    whole = set(options.only) == set(METHODS) and set(options.size) >= set(ON_CPU)
    if whole or options.device != "cpu":
        name = "optimizer_step" if options.device == "cpu" else f"optimizer_step_{options.device}"
        (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")


def measure(
    size: str, steps: int, methods: Sequence[str], device: str, dtype: torch.dtype
) -> dict[str, Any]:
    """Pair each method with AdamW; the first three steps of each are not counted."""
    found: dict[str, Any] = {}
    for name in track([name for name in METHODS if name in methods and name != "adamw"], size):
        with (
            _process("adamw", size, device, dtype) as adamw,
            _process(name, size, device, dtype) as method,
        ):
            pair = {"adamw": adamw, name: method}
            _alternate(pair, 3)
            for process in pair.values():
                process.submit(_reset_peak).result()
            taken = _alternate(pair, steps)
            for side, process in pair.items():
                found[side] = {
                    **_figures(taken[side], taken["adamw"]),
                    "bytes_beside_weights": process.submit(_bytes_beside_weights).result(),
                    "peak_bytes": process.submit(_peak_bytes).result(),
                }
            found[name]["adamw_beside_it"] = found["adamw"]["median"]
            print(name, f"{found[name]['median']:.4f} s beside {found['adamw']['median']:.4f} s")
    return found


def _alternate(pair: Mapping[str, ProcessPoolExecutor], steps: int) -> dict[str, list[Step]]:
    taken: dict[str, list[Step]] = {side: [] for side in pair}
    for _ in range(steps):
        for side, process in pair.items():
            taken[side].append(process.submit(_step).result())
    return taken


def _figures(steps: list[Step], of_adamw: list[Step]) -> dict[str, float]:
    seconds = [step.seconds for step in steps]
    ratios = [a.seconds / b.seconds for a, b in zip(of_adamw, steps, strict=True)]
    figures = {
        "median": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "times_faster_than_adamw": statistics.median(ratios),
    }
    refreshes = [step.seconds for step in steps if step.refreshed]
    others = [step.seconds for step in steps if not step.refreshed]
    if refreshes and others:
        ratio = statistics.median(refreshes) / statistics.median(others)
        figures["refresh_step_over_others"] = ratio
    return figures


def _process(method: str, size: str, device: str, dtype: torch.dtype) -> ProcessPoolExecutor:
    """A process that holds one side."""
    arguments = (method, size, device, dtype)
    return ProcessPoolExecutor(1, get_context("spawn"), initializer=_start, initargs=arguments)


_side: Side  # of a side's process


def _start(method: str, size: str, device: str, dtype: torch.dtype) -> None:
    global _side
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    _side = Side(method, size, device, dtype)


def _end_with_the_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _step() -> Step:
    return _side.step()


def _bytes_beside_weights() -> int:
    return _side.bytes_beside_weights


def _reset_peak() -> None:
    reset_peak(_side.device)


def _peak_bytes() -> int | None:
    return peak_bytes(_side.device).value


def table(size: str, measured: dict[str, Any]) -> Table:
    """Lay the figures out."""
    shown = Table(
        "method",
        "s a step",
        "min – max",
        "× adamw",
        "refresh step / others",
        "MiB beside weights",
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", nargs="*", choices=SIZES, default=list(ON_CPU))
    parser.add_argument(
        "--only", nargs="*", choices=METHODS, default=METHODS, help="these methods, and adamw"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=7, help="counted steps of each method")
    return parser


if __name__ == "__main__":
    main()
