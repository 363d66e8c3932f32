"""Runs `python train.py` as a user does, where a process of its own is the point."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import train

TINY = [
    "plan.check=false",  # a plan takes longer than a tiny run; tests/run/test_memory_check.py plans
    "model=tiny",
    "model.config.hidden_size=32",
    "logger=none",
    "~callbacks.samples",
    "data.max_length=160",
    "data.max_val_examples=4",
    "trainer.accelerator=cpu",
]

# In a sweep Hydra reads ~x as "delete x if it is null".
SWEPT = [setting for setting in TINY if not setting.startswith("~")]


def start(*arguments: str, cwd: Path | None = None) -> subprocess.Popen:
    """Start `python train.py` with these arguments; its output, errors included, is a pipe."""
    return subprocess.Popen(
        [sys.executable, train.__file__, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def run(*arguments: str, cwd: Path | None = None) -> tuple[int, str]:
    """Return exit status and output of `python train.py` with these arguments."""
    process = start(*arguments, cwd=cwd)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def signal_at(process: subprocess.Popen, line: str, number: int) -> tuple[int, str]:
    """Send a signal when a line that begins so appears; return exit status and output."""
    lines = []
    for text in process.stdout:
        lines.append(text)
        if text.startswith(line):
            process.send_signal(number)
    return process.wait(60), "".join(lines)


TWO_RANKS = [
    *TINY,
    "trainer.devices=2",
    "optim=galore_subspace",
    "galore.rank=8",
    "data.batch_size=2",
]
