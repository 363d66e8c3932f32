"""The folder of a run: one run at a time writes to it, and the results in it are safe.

Each start keeps a record: its configuration and its arguments. The record of the first start is in
`.hydra`, that of the second one in `.hydra/2`, and so on. If the folder holds results, a new start
touches nothing of them before it has trained a step itself. Until then, all that it writes is in
`.hydra/starting`, and in new files of the loggers.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import FileLock, SoftFileLock, Timeout

from lit_ft.compat import remedies
from lit_ft.compat.refusal import Refusal
from lit_ft.distributed.ranks import process_rank
from lit_ft.run.files import (
    LOCK,
    SETTINGS,
    SUMMARY,
    has_checkpoint,
    has_results,
    has_trained,
    is_settings_file,
    logs_of_run,
    remove_files,
    remove_left_overs_of_run,
    results_of_run,
    traces_of_run,
)
from lit_ft.run.record import FOLDER as RECORD
from lit_ft.run.record import numbered
from lit_ft.run.run_log import RunLog
from lit_ft.storage.atomic import remove, write_text


class RunFolder:
    """Locks the folder of a run, and keeps the results in it safe until a step is trained.

    Use it as a context manager around the whole run, and call `begin` before anything is loaded.
    If there are results, nothing is written before that. Only the first rank touches files.

    Args:
        path: The folder, created if it is missing.
        record: The texts of the files in this start's record, keyed by file name.
        settings: The text of the run's own settings, which is written to `config.yaml`; empty to
            write none.
        log_name: The name of the log in the folder.

    Attributes:
        is_open: Whether this start may write to all of the folder.
        goes_on: Whether this start goes on with a checkpoint of the folder, as `begin` finds out.

    Raises:
        Refusal: On entering, if another run holds the lock.
    """

    def __init__(
        self,
        path: str | Path,
        record: Mapping[str, str],
        *,
        settings: str = "",
        log_name: str = "train.log",
    ) -> None:
        self.path = Path(path)
        self.is_open = False
        self.goes_on = False
        self._holds_run = self._has_begun = False
        self._record = record
        self._settings = settings
        self._log_name = log_name
        self._log: RunLog | None = None
        self._files: set[Path] = set()  # of runs, before this start
        self._logs: set[Path] = set()
        self._held = ExitStack()

    @property
    def summary(self) -> Path:
        """The place of this start's summary."""
        return (self.path if self.is_open else self._starting) / SUMMARY

    @property
    def may_write(self) -> bool:
        """Whether this start may write its own files already."""
        return self.is_open or self._has_begun

    @property
    def _starting(self) -> Path:
        return self.path / RECORD / "starting"

    def __enter__(self) -> Self:
        if process_rank() == 0:
            self.path.mkdir(parents=True, exist_ok=True)
            with ExitStack() as held:
                held.enter_context(_locked(self.path))
                self._start()
                self._held = held.pop_all()
        else:
            self._look()
        return self

    def _look(self) -> None:
        self._holds_run = has_trained(self.path)
        self.is_open = not has_results(self.path)

    def _start(self) -> None:
        self._look()
        traces = traces_of_run(self.path, self._log_name)
        if self.is_open:
            remove_files(traces)  # of a run that has left no result
            self._write_record(self.path / RECORD)
            self._write_settings()
        else:
            self._files = traces | results_of_run(self.path)
            self._logs = logs_of_run(self.path)

    def _write_record(self, place: Path) -> None:
        remove(self._starting)  # of a start that was killed
        for name, text in self._record.items():
            write_text(place / name, text)
        self._log = RunLog(self.summary.with_name(self._log_name))

    def _write_settings(self) -> None:
        """Write the settings of the run that the folder holds, unless the name is taken."""
        file = self.path / SETTINGS
        if self._settings and (is_settings_file(file) or not file.exists()):
            write_text(file, self._settings)

    def begin(self, resume: Path | None, *, trains: bool = True, overwrite: bool = False) -> None:
        """Let the run begin, unless it would be the second one in its folder.

        Args:
            resume: The checkpoint that the run goes on from; None to start afresh.
            trains: Whether the run trains. A run that only validates adds its record to a trained
                run.
            overwrite: Whether a run that starts afresh may replace the one in the folder.

        Raises:
            Refusal: If the folder holds a trained run that this one neither goes on with nor may
                replace.
        """
        own = (self.path / "checkpoints").resolve()
        self.goes_on = resume is not None and own in resume.resolve().parents
        if self._holds_run and trains and not self.goes_on and not overwrite:
            raise Refusal(
                f"{self.path} holds a run that has trained",
                *([remedies.GO_ON] if has_checkpoint(self.path) else []),
                remedies.OTHER_FOLDER,
                remedies.REPLACE_RUN,
            )
        self._has_begun = True
        if not self.is_open and process_rank() == 0:
            self._write_record(self._starting)

    def open(self) -> None:
        """Make this start the run of the folder, since it has trained a step.

        If it does not go on with the run in the folder, the files of that run are removed.
        """
        if self.is_open:
            return
        self.is_open = True
        if process_rank() != 0:
            return
        assert self._log is not None
        if not self.goes_on:
            remove_files(self._files)
        self._log.move_to(self.path / self._log_name)
        if (self._starting / SUMMARY).exists():
            (self._starting / SUMMARY).replace(self.summary)
        if self.goes_on:
            self._keep_record()
        else:
            for file in self._starting.iterdir():
                file.replace(self.path / RECORD / file.name)
            self._starting.rmdir()
        self._write_settings()
        remove_left_overs_of_run(self.path)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._held:
            if self._log is None:
                return
            if not self.is_open:
                remove_files(logs_of_run(self.path) - self._logs)
            if not self.is_open and error is None and not self._holds_run:
                self.open()  # it has validated, as the run before it
            self._log.close()
            if not self.is_open and error is None:
                self._keep_record()
            elif not self.is_open:
                remove(self._starting)

    def _keep_record(self) -> None:
        newest = max((number for number, _ in numbered(self.path)), default=1)
        self._starting.rename(self.path / RECORD / str(newest + 1))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which the system releases if this process is killed."""
    file = folder / LOCK
    try:
        with FileLock(file, timeout=0) as lock:
            if not isinstance(lock, SoftFileLock):  # it writes the file itself
                file.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
            yield
    except Timeout:
        holder = file.read_text().strip() or "another process"
        raise Refusal(
            f"A run is writing to {folder}: {holder}",
            remedies.WAIT_FOR_RUN,
            remedies.OTHER_FOLDER,
        ) from None
