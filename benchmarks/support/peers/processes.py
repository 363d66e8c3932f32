"""The processes of the rows: each is fresh, and runs the script with `--one`."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from support.peers.environment import python_with
from support.peers.job import Job
from support.peers.rows import ROWS
from support.results import ROOT

Record = dict[str, Any]


class Processes:
    """Starts the process of a row.

    Args:
        environments: The folder of the environments for peers that need one.
        counter: The library that counts what torch allocates; None to count nothing, which is
            faster.
    """

    def __init__(self, environments: Path, counter: Path | None = None) -> None:
        self.environments = environments
        self.counter = counter

    def run(self, row: str, job: Job) -> Record:
        """Do the job and return what it has written; an error if it fails."""
        process, output = self._start(row, job)
        process.wait()
        return _record(process, job, output)

    @contextmanager
    def taking_turns(self, row: str, job: Job) -> Iterator[InTurn]:
        """Start a row that takes a step when it is asked to."""
        reading, writing = os.pipe()
        process, output = self._start(row, replace(job, turns=writing), stdin=subprocess.PIPE)
        os.close(writing)
        try:
            with os.fdopen(reading) as told:
                yield InTurn(process, told, output)
        finally:
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # it has ended before its turn
                process.stdin.close()  # a row that waits for its turn ends
            process.wait()

    def _start(self, row: str, job: Job, **options: Any) -> tuple[subprocess.Popen[str], Path]:
        python = python_with(ROWS[row].packages, self.environments)
        folder = Path(job.folder)
        file, output = folder / "job.json", folder / "output.txt"
        job.write(file)
        job.result.unlink(missing_ok=True)
        command = [python, str(ROOT / "benchmarks/peers.py"), "--one", row, "--job", str(file)]
        with output.open("w") as stream:
            process = subprocess.Popen(
                command,
                text=True,
                env=self._environment(job),
                pass_fds=() if job.turns is None else (job.turns,),
                stdout=stream,
                stderr=subprocess.STDOUT,
                **{"stdin": subprocess.DEVNULL, **options},
            )
        return process, output

    def _environment(self, job: Job) -> Mapping[str, str]:
        paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
        preload = {} if self.counter is None else {"LD_PRELOAD": str(self.counter)}
        threads = {"OMP_NUM_THREADS": str(job.threads), "TOKENIZERS_PARALLELISM": "false"}
        return {**os.environ, **threads, **preload, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}


class InTurn:
    """A row that takes one step at a time.

    Args:
        process: The row's process, which waits for a line.
        told: Where it tells the end of each step.
        output: The file of its output.
    """

    def __init__(self, process: subprocess.Popen[str], told: Any, output: Path) -> None:
        self.process = process
        self.told = told
        self.output = output

    def step(self) -> tuple[float, int]:
        """Let it take a step; return the seconds and the tokens of the step.

        Raises:
            RuntimeError: If the process ends instead.
        """
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # what it last said is read below
            print(file=self.process.stdin, flush=True)
        line = self.told.readline()
        if not line:
            self.process.wait()
            raise RuntimeError(_end_of(self.output))
        seconds, tokens = line.split()
        return float(seconds), int(tokens)


@contextmanager
def scratch() -> Iterator[Path]:
    """Make a folder for the files of a job."""
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        yield Path(folder)


def _record(process: subprocess.Popen[str], job: Job, output: Path) -> Record:
    if job.result.is_file():
        found: Record = json.loads(job.result.read_text(encoding="utf-8"))
        return found
    return {"error": f"exit code {process.returncode}: {_end_of(output)}"}


def _end_of(output: Path) -> str:
    lines = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "no output"
