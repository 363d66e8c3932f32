"""What does one GPU measure in eight minutes, on a machine without a network?

    benchmarks/on_gpu.sh pack      # where lit_ft is installed; see support/pack.py
    benchmarks/on_gpu.sh           # on the machine with the GPU
    benchmarks/on_gpu.sh --device cpu --tiny --output build/tried

Four stages run one after another, from the one whose answer matters most. Each is stopped after
its share of the time, and the last has what is left:

1. `memory`: the plan of ten runs of train.py, with 1 to 8 billion weights, against the GPU's peak;
2. `speed`: peak and tokens per second of Llama 3.1 8B with galore_subspace_8bit, at batch 1 and 2,
   with and without clipping by norm;
3. `steps`: steps of AdamW, LoRA and GaLore on four layers of Llama 3 8B, with profiles;
4. `tests`: tests/contracts/test_cuda.py.

Each result is written as it comes, so what a run has found before it is interrupted counts.

Results: results/on_gpu.json says how each stage ended, with the end of its output. The figures
are in results/one_gpu.json, results/optimizer_step_cuda.json and
results/optimizer_step_cuda_profile.md.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from support.arguments import script_parser
from support.results import ROOT, this_run, write_json

_LINES = 80  # of the output of a stage: a failed test and what failed before it
_STEPS_OF = ("lora r16", "galore_subspace, every 4")
_STEPS_OF += ("galore_subspace_8bit, every 4", "galore_subspace_8bit, every 4, layerwise")


class Stage(NamedTuple):
    """A command of Python, and the share of the time that it may take."""

    command: list[str]
    share: float


def main() -> None:
    """Run the stages, and exit with 1 if one of them failed or was stopped."""
    parser = script_parser(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="where it runs")
    parser.add_argument("--tiny", action="store_true", help="shrink all models, to try the script")
    parser.add_argument("--seconds", type=float, default=450, help="the time for all stages")
    options = parser.parse_args()
    ends = time.monotonic() + options.seconds
    record: dict[str, Any] = {**this_run(), "stages": {}}
    for name, stage in stages(options.output, device=options.device, tiny=options.tiny).items():
        limit = min(stage.share * options.seconds, ends - time.monotonic())
        print(f"== {name}: {limit:.0f} s at most", flush=True)
        record["stages"][name] = run(stage.command, limit)
        write_json(options.output / "on_gpu.json", record)
    ended = {name: stage["ended"] for name, stage in record["stages"].items()}
    print(f"== {ended}, results in {options.output}")
    sys.exit(any(ended.values()))


def stages(output: Path, *, device: str, tiny: bool) -> dict[str, Stage]:
    """Return the stages, from the most valuable one, keyed by name.

    Args:
        output: The folder for the results.
        device: The device to run on, "cuda" or "cpu".
        tiny: Whether to shrink the models.
    """
    shared = ["--device", device, "--output", str(output.resolve())]
    cells = ["benchmarks/one_gpu.py", *shared, *["--tiny"] * tiny]
    steps = ["benchmarks/optimizer_step.py", *shared, "--size", "tiny" if tiny else "four_of_8b"]
    steps += ["--dtype", "bfloat16", "--steps", "8", "--profile", "--only", "adamw", *_STEPS_OF]
    tests = ["-m", "pytest", "-vv", "-p", "no:cacheprovider", "tests/contracts/test_cuda.py"]
    workers = min(6, (os.cpu_count() or 1) // 2)
    return {
        "memory": Stage([*cells, "--group", "memory"], 0.42),
        "speed": Stage([*cells, "--group", "speed"], 0.3),
        "steps": Stage(steps, 0.3),
        "tests": Stage([*tests, "-n", str(workers)], 1.0),
    }


def run(arguments: list[str], seconds: float) -> dict[str, Any]:
    """Run `python ARGUMENTS`, show its output, and end it and all that it has started in time.

    Args:
        arguments: The file, or `-m` and a module, with its arguments.
        seconds: The time after which it is ended. Without any it is not begun.

    Returns:
        The `command`, the `seconds`, the end of the `output`, and how it `ended`: the exit status,
        negative for a signal, or "no time left".
    """
    told: dict[str, Any] = {"command": shlex.join(["python", *arguments])}
    if seconds <= 0:
        return {**told, "ended": "no time left"}
    began, last = time.monotonic(), deque[str](maxlen=_LINES)
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1", "COLUMNS": "120"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        process_group=0,  # of its own, for the signal
    )
    timer = threading.Timer(seconds, _end, [process])
    timer.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last.append(line)
        ended = process.wait()
    finally:
        timer.cancel()
        _end(process)
    taken = round(time.monotonic() - began, 1)
    return {**told, "ended": ended, "seconds": taken, "output": "".join(last)}


def _end(process: subprocess.Popen[str]) -> None:
    """End a process and all that it has started, if anything of it is there."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
