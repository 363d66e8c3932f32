"""Run a command of Python in a process of its own that begins with its libraries loaded.

To load them takes longer than to train a tiny model for a few steps.
"""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path

from support.results import ROOT

_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "lit_ft.run.job",
        "lit_ft.run.plan",
        "torch.distributed.fsdp",
        "bitsandbytes.optim",
        "peft",
        *(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "qwen3", "gemma3")),
    ]
)


class CommandFailed(Exception):
    """Raised with the output of a command that fails."""


def run_python(arguments: Sequence[str]) -> None:
    """Run `python ARGUMENTS`, where the first are a file or `-m` and a module.

    Raises:
        CommandFailed: If the command does not end with exit code 0.
    """
    with tempfile.NamedTemporaryFile("r", suffix=".txt", errors="replace") as output:
        process = _CONTEXT.Process(target=_main, args=(list(arguments), output.name))
        process.start()
        process.join()
        if process.exitcode:
            shown = output.read()[-4000:]
            raise CommandFailed(f"exit code {process.exitcode} of {' '.join(arguments)}\n{shown}")


def _main(arguments: list[str], output: str) -> None:
    os.chdir(ROOT)
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), stream)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [str(Path(arguments[0]).resolve()), *arguments[1:]]
        runpy.run_path(sys.argv[0], run_name="__main__")
