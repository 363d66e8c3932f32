"""The folder of a run: one run at a time writes to it, and a trained run in it is safe.

Each start keeps a record: its configuration and its arguments. The record of the first start is in
`.hydra`, that of the second one in `.hydra/2`, and so on. If the folder holds a trained run, a new
start touches nothing of it before it has trained a step itself. Until then, all that it writes is
in `.hydra/starting`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_only

from lit_ft.compat import remedies
from lit_ft.compat.refusal import Refusal
from lit_ft.run.record import FOLDER as RECORD
from lit_ft.run.run_log import RunLog
from lit_ft.storage.atomic import (
    remove,
    remove_left_over,
    replace_atomically,
    temporary_path,
    write_text,
)
from lit_ft.storage.json_file import read_json

LOCK = ".lock"
SUMMARY = "summary.json"
_RESULTS = ("checkpoints", "export")
_LOGS = ("tensorboard", "csv")


class RunFolder:
    """Locks the folder of a run, and keeps a trained run in it safe until a step is trained.

    Use it as a context manager around the whole run, and call `begin` before anything is written.
    Only the first rank touches files.

    Args:
        path: The folder, created if it is missing.
        record: The texts of the files in this start's record, keyed by file name.
        log_name: The name of the log in the folder.

    Attributes:
        holds_run: Whether the folder held a trained run before this start.
        is_open: Whether this start may write to all of the folder.

    Raises:
        Refusal: On entering, if another run holds the lock.
    """

    def __init__(
        self, path: str | Path, record: Mapping[str, str], *, log_name: str = "train.log"
    ) -> None:
        self.path = Path(path)
        self.holds_run = has_trained(self.path)
        self.is_open = not self.holds_run
        self._record = record
        self._log_name = log_name
        self._log: RunLog | None = None
        self._began = self._goes_on = False
        self._before: set[Path] = set()
        self._lock = ExitStack()

    @property
    def summary(self) -> Path:
        """The place of this start's summary."""
        return self._base / SUMMARY

    @property
    def _base(self) -> Path:
        return self.path if self.is_open else self.path / RECORD / "starting"

    def __enter__(self) -> Self:
        if not _is_first_rank():
            return self
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock.enter_context(_locked(self.path))
        self._before = set(self.path.rglob("*"))
        if self.is_open and SUMMARY in {file.name for file in self.path.iterdir()}:
            self._remove(RECORD, SUMMARY, self._log_name, *_LOGS)  # of a run that left no weights
        remove(self.path / RECORD / "starting")
        for name, text in self._record.items():
            place = self.path / RECORD if self.is_open else self._base
            write_text(place / name, text)
        self._log = RunLog(self._base / self._log_name)
        return self

    def begin(self, resume: Path | None, *, trains: bool = True, overwrite: bool = False) -> None:
        """Hold a run that would be the second one in its folder.

        Args:
            resume: The checkpoint that the run goes on from; None to start afresh.
            trains: Whether the run trains. A run that only validates adds nothing but its record.
            overwrite: Whether a run that starts afresh may replace the one in the folder.

        Raises:
            Refusal: If the folder holds a trained run that this one neither goes on with nor may
                replace.
        """
        self._began = True
        self._goes_on = resume is not None and self.path.resolve() in resume.resolve().parents
        if self.holds_run and trains and not self._goes_on and not overwrite:
            raise Refusal(
                f"{self.path} holds a run that has trained",
                remedies.GO_ON,
                remedies.OTHER_FOLDER,
                remedies.REPLACE_RUN,
            )

    def open(self) -> None:
        """Make this start the run of the folder, since it has trained a step.

        If it has not resumed the run in the folder, the files of that run are removed.
        """
        if self.is_open:
            return
        starting = self._base
        self.is_open = True
        if not _is_first_rank():
            return
        assert self._log is not None
        if not self._goes_on:
            self._remove(SUMMARY, self._log_name, *_RESULTS, *_LOGS)
        self._log.move_to(self.path / self._log_name)
        (starting / SUMMARY).unlink(missing_ok=True)
        if self._goes_on:
            starting.rename(self._next_record())
        else:
            new = temporary_path(self.path / RECORD)
            remove(new)
            replace_atomically(starting.rename(new), self.path / RECORD)
        for folder in (self.path, *(self.path / name for name in _RESULTS)):
            remove_left_over(folder)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._log is None:
            return
        self._log.close()
        if not self.is_open and error is None and self._began:
            self._base.rename(self._next_record())  # it has only validated
        elif not self.is_open:
            self._forget()
        self._lock.close()

    def _next_record(self) -> Path:
        numbers = [int(one.name) for one in _children(self.path / RECORD) if one.name.isdecimal()]
        return self.path / RECORD / str(max(numbers, default=1) + 1)

    def _remove(self, *names: str) -> None:
        """Remove files that were there before this start."""
        for name in names:
            place = self.path / name
            for file in sorted({place, *place.rglob("*")} & self._before, reverse=True):
                if not file.is_dir() or not any(file.iterdir()):
                    remove(file)

    def _forget(self) -> None:
        """Remove what this start has written."""
        remove(self._base)
        for name in _LOGS:
            for file in sorted(set((self.path / name).rglob("*")) - self._before, reverse=True):
                remove(file)


def has_trained(folder: Path) -> bool:
    """Whether a folder holds the results of a training run: weights, or a summary with steps."""
    saved = [one.name for one in _children(folder / "checkpoints")]
    # A run that was killed while it replaced a folder has left only the backup.
    if any(name.endswith((".ckpt", ".ckpt.old")) for name in saved) or (folder / "export").is_dir():
        return True
    try:
        return bool(read_json(folder / SUMMARY)["steps"])
    except FileNotFoundError:
        return False
    except (OSError, ValueError, LookupError):
        return True  # it is damaged, so nothing speaks against it


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which the system releases if this process is killed."""
    file = folder / LOCK
    try:
        with FileLock(file, timeout=0):
            file.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
            yield
    except Timeout:
        holder = file.read_text().strip() or "another process"
        raise Refusal(
            f"A run is writing to {folder}: {holder}",
            remedies.WAIT_FOR_RUN,
            remedies.OTHER_FOLDER,
        ) from None


def _children(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _is_first_rank() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0
