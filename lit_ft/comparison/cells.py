"""The runs of a comparison: each has a folder of its own, and is kept once it has finished."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from lit_ft.run.arguments import PATHS, ROOT
from lit_ft.run.files import LOCK, read_summary
from lit_ft.run.supervised import environment_of_supervised

_FINISHED = ("completed", "pruned", "failed", "out_of_memory")
_LAST_STEP = 60  # seconds that a run may take to end after a signal
# What is known of a run that the system killed. It is not kept, so the run is tried again.
_KILLED = {
    "status": "failed",
    "ended": "killed, as the system does when memory runs out",
    "steps": 0,
    "val_loss": None,
}
_PATIENCE = 0.5  # seconds between two looks at whether to stop
_LONGEST = 80  # characters of the part of a folder's name that people read


@dataclass(frozen=True)
class Cell:
    """A run of a comparison.

    Attributes:
        arguments: The arguments of `train.py`, without those that say where it writes.
        folder: The folder of the run.
        name: The arguments that tell it from others, for people.
    """

    arguments: tuple[str, ...]
    folder: Path
    name: str

    def finished(self) -> Mapping[str, Any] | None:
        """Return the summary of the run if it has finished, well or not; else None."""
        try:
            summary = read_summary(self.folder)
        except ValueError:  # damaged, so it runs again
            return None
        return summary if summary is not None and summary["status"] in _FINISHED else None

    def run(self, environment: Mapping[str, str], stopped: Event) -> Mapping[str, Any]:
        """Train in a process of its own, and return the summary.

        The process ends with this one, however that ends.

        Args:
            environment: The variables to set in addition to those of this process.
            stopped: The event that ends the process.

        Raises:
            ValueError: If the run did not finish, or if another one is going on in its folder.
        """
        self._wait_for_earlier()
        command = [sys.executable, str(ROOT / "train.py"), *self.arguments]
        command += [f"run_dir={self.folder}", "overwrite=true", "ui=off"]
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                command,
                env={**os.environ, **environment_of_supervised(), **environment},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            try:
                while process.poll() is None and not stopped.is_set():
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(timeout=_PATIENCE)
            finally:
                process.terminate()
                process.wait()
            output.seek(0)
            said = output.read().strip()
        if (summary := self.finished()) is not None:
            return summary
        if process.returncode == -signal.SIGKILL:
            return _KILLED
        raise ValueError(f"A run did not finish: {said}")

    def _wait_for_earlier(self) -> None:
        """Wait until a run that a killed process has left behind has ended."""
        lock = self.folder / LOCK
        if lock.exists():
            try:
                with FileLock(lock, timeout=_LAST_STEP):
                    pass
            except Timeout as error:
                raise ValueError(f"{self.folder}: another run is going on there.") from error


def cell_of(name: str, arguments: Sequence[str], settings: Mapping[str, Any], folder: Path) -> Cell:
    """Return the run with these arguments.

    Its folder ends in a digest of all that it is: a run whose settings or files have changed is
    another one, and one that is called by another name is the same.

    Args:
        name: The arguments that tell the run from others.
        arguments: The arguments of `train.py`.
        settings: All that makes the run what it is, as plain values.
        folder: The folder of the comparison.
    """
    text = json.dumps(settings, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    readable = re.sub(r"[^\w.]+", "-", name)[:_LONGEST].strip("-")
    own = next(folder.glob(f"*-{digest}"), folder / f"{readable}-{digest}")
    return Cell(tuple(arguments), own, name)


def files_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes and times of the files that a configuration names, keyed by setting.

    Other rows under the same name make another run.

    Args:
        config: The resolved configuration.
    """
    found, settings = {}, OmegaConf.create(dict(config))
    for name in PATHS:
        value = OmegaConf.select(settings, name)
        if isinstance(value, str) and (path := Path(value).expanduser()).exists():
            files = sorted(path.iterdir()) if path.is_dir() else [path]
            found[name] = [_stamp(file) for file in files if file.is_file()]
    return found


def _stamp(file: Path) -> tuple[str, int, int]:
    found = file.stat()
    return file.name, found.st_size, found.st_mtime_ns
