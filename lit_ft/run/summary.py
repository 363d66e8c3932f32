"""summary.json: the results of a run in machine-readable form, even if the run fails."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_ft.callbacks.pruning import is_pruned
from lit_ft.callbacks.stop import SIGHUPException
from lit_ft.compat.refusal import message_on_command_line
from lit_ft.distributed.ranks import process_rank
from lit_ft.measure import is_out_of_memory
from lit_ft.measure.environment import hardware, versions
from lit_ft.run.exits import unwrapped
from lit_ft.run.files import SUMMARY, read_summary
from lit_ft.run.first_error import add_to_summary, end_of_another, follows_another
from lit_ft.run.folder import RunFolder
from lit_ft.run.redaction import redacted
from lit_ft.storage.disk import disk_bytes
from lit_ft.storage.json_file import as_plain, write_json

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1


class RunSummary:
    """Collects the results of a run and writes them to `run_dir/summary.json`.

    Use it as a context manager around the whole run. The file is written at the start, with the
    status "interrupted", so its status is right even if the run is killed.

    Args:
        run_dir: The folder of the run, created if it is missing.
        config: The resolved configuration as plain values. Its secrets are redacted.
        folder: The guarded folder of the run, which decides where the file is written until a step
            is trained; None always writes to `run_dir`.

    Attributes:
        fields: The fields of the file.
        earlier: The summary that an earlier run has left in the folder, read on entering; None if
            there is none, or if this run starts afresh.
        samples: The samples that the run has generated, which are not written to the file.
    """

    def __init__(
        self, run_dir: str | Path, config: Mapping[str, Any], *, folder: RunFolder | None = None
    ) -> None:
        self.folder = folder
        self.run_dir = Path(run_dir)
        self.earlier: dict[str, Any] | None = None
        self.samples: list[dict[str, Any]] = []
        self._began = time.monotonic()
        self.fields: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "status": "interrupted",
            "ended": None,
            "error": None,
            "starts": [],
            "config": redacted(config),
            "versions": versions(),
            "hardware": hardware(),
            "seed": config.get("seed"),
            "steps": 0,
            "tokens": 0,
            "model": {
                "name": None,
                "parameters": None,
                "trainable_parameters": None,
                "weight_bytes": None,
            },
            "data": {"train": None, "val": None, "rows_per_step": None},
            "initial_val_loss": None,
            "val_loss": None,
            "val_perplexity": None,
            "val_loss_by_source": None,
            "train_loss": None,
            "forgetting": None,
            "scores": None,
            "history": {"train": [], "val": []},
            "seconds": {"total": None, "load": None, "train": None},
            "tokens_per_second": None,
            "step_seconds": {"median": None, "p95": None, "max": None},
            "peak_bytes": {"value": None, "source": None},
            "planned_peak_bytes": None,
            "optimizer_state_bytes": None,
            "checkpoint_path": None,
            "export_path": None,
            "disk_bytes": {"checkpoints": None, "export": None},
        }

    @property
    def path(self) -> Path:
        """The place of the file, which changes once `open` is called."""
        return self.run_dir / SUMMARY if self.folder is None else self.folder.summary

    @property
    def is_open(self) -> bool:
        """Whether the run may write all of its results to its folder; see `RunFolder`."""
        return self.folder is None or self.folder.is_open

    def open(self) -> None:
        """Make this run the one of its folder; see `lit_ft.run.folder.RunFolder.open`."""
        if self.folder is not None and not self.folder.is_open:
            self.folder.open()
            self.write()

    def note_start(self, arguments: Sequence[str], resume: Path | None) -> None:
        """Add this start to those of the run that it resumes.

        Args:
            arguments: The arguments of the command line.
            resume: The checkpoint that the run goes on from; None to start afresh.
        """
        if resume is None or (self.folder is not None and not self.folder.goes_on):
            self.earlier = None
        earlier = (self.earlier or {}).get("starts", [])
        began = datetime.now(UTC).isoformat(timespec="seconds")
        this = {"began": began, "arguments": list(arguments), "resume": resume and str(resume)}
        self.fields["starts"] = [*earlier, this]

    @rank_zero_only
    def note_disk(self) -> None:
        """Record what the checkpoints and the exported model take of the disk."""
        checkpoint, export = (self.fields[f"{name}_path"] for name in ("checkpoint", "export"))
        self.fields["disk_bytes"] = {
            "checkpoints": None if checkpoint is None else disk_bytes(Path(checkpoint).parent),
            "export": None if export is None else disk_bytes(Path(export)),
        }

    def update(self, **fields: Any) -> None:
        """Set fields of the summary; their names must be in the schema."""
        unknown = fields.keys() - self.fields.keys()
        assert not unknown, unknown
        self.fields.update(fields)

    def loaded(self) -> None:
        """Record that the model and the data are loaded, which completes `seconds.load`."""
        self.fields["seconds"]["load"] = self._elapsed()

    @rank_zero_only
    def write(self) -> None:
        """Write the file completely or not at all; another rank's error in it stays."""
        self._write({**self.fields, **end_of_another(self.path)})

    def __enter__(self) -> Self:
        self.earlier = _earlier(self.run_dir)
        self._write(self.fields)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        error = None if error is None else unwrapped(error)
        status = status_of(error)
        self.update(status=status)
        if error is not None:
            ended = _ended_by(error, status, self.fields["steps"], self.fields["ended"])
            self.update(ended=ended)
        if error is not None and status not in ("interrupted", "pruned"):
            lines = traceback.format_exception(error, limit=-5)
            self.update(
                error={
                    "type": type(error).__name__,
                    "message": message_on_command_line(error),
                    "traceback": lines,
                }
            )
            log.error("The traceback of the error that ended the run:", exc_info=error)
        try:
            self._write_end(error)
        except OSError:
            if error is None:  # otherwise what went wrong first is what the user has to know
                raise
        self._log_end()

    def _write_end(self, error: BaseException | None) -> None:
        """Write the end of this rank, and leave that of another one which it follows."""
        rank = process_rank()
        if rank == 0 and follows_another(error):
            self.update(**end_of_another(self.path))
        if rank == 0:
            self._write(self.fields)
        elif self.fields["error"] is not None and not follows_another(error):
            end = {name: self.fields[name] for name in ("status", "error")}
            end["ended"] = f"{self.fields['ended']} (on rank {rank})"
            add_to_summary(self.path, redacted(end), rank=rank)

    @rank_zero_only
    def _write(self, fields: Mapping[str, Any]) -> None:
        if self.folder is not None and not self.folder.may_write:
            return
        self.fields["seconds"]["total"] = self._elapsed()
        write_json(self.path, _finite(redacted(fields)), indent=2)

    @rank_zero_only
    def _log_end(self) -> None:
        log.info("Ended: %s.", self.fields["ended"])

    def _elapsed(self) -> float:
        return round(time.monotonic() - self._began, 3)


def as_written(value: Any) -> Any:
    """Return plain values as they come back from the file."""
    return as_plain(_finite(value))


def status_of(error: BaseException | None) -> str:
    """Return the status of a run that `error` has ended.

    It is completed, interrupted, pruned, out_of_memory or failed.
    """
    if error is None:
        return "completed"
    if is_pruned(error):
        return "pruned"
    # Lightning turns Ctrl-C into SystemExit(1) and a SIGTERM into SIGTERMException.
    if isinstance(error, (KeyboardInterrupt, SIGTERMException)) or isinstance(
        error.__context__, KeyboardInterrupt
    ):
        return "interrupted"
    return "out_of_memory" if is_out_of_memory(error) else "failed"


def _ended_by(error: BaseException, status: str, steps: int, trained: str | None) -> str:
    """Return the sentence for a run that an error or a signal ended after `steps` steps.

    A signal after the training, which scores or validates then, leaves why that ended: `trained`.
    """
    place = f"at step {steps}" if steps else "before the first step"
    if status == "pruned":
        return f"pruned: {error}"
    if status == "out_of_memory":
        return f"out of memory {place}"
    if status == "failed":
        first, *_ = message_on_command_line(error).strip().splitlines() or [""]
        return f"{type(error).__name__} {place}: {first}".rstrip(".")
    by = "SIGTERM" if isinstance(error, SIGTERMException) else "Ctrl-C"
    by = "SIGHUP" if isinstance(error, SIGHUPException) else by
    return f"{by} {place}" if trained is None else f"{trained}, then {by}"


def _earlier(run_dir: str | Path) -> dict[str, Any] | None:
    try:
        return read_summary(run_dir)
    except ValueError as error:
        rank_zero_warn(str(error).partition(". `")[0] + ", and is written again.")
        return None


def _finite(value: Any) -> Any:
    """Return `value` with None for NaN and infinity, which are not JSON."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value
