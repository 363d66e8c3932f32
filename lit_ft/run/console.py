"""Keep libraries' messages off the terminal, and the terminal's faults off the run."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from lit_ft.terminal.libraries import adopt_bars, adopt_logs

# A user of lit_ft cannot act on these: they are mostly deprecations between libraries.
_WARNINGS = (
    "'set_vital' is deprecated",  # torchdata calls torch
    "`isinstance\\(treespec, LeafSpec\\)`",  # lightning calls torch
    "`torch.jit.script",  # torch calls itself
    "`is_gradient_checkpointing` is deprecated",  # peft calls transformers
    "PiSSA changes the base weights",  # the export is for the original weights
    "Accessing the data pointer of FakeTensor",  # bitsandbytes, while a run is planned
    ".*does not have many workers",  # tokenised data is read from a memory map
    ".*sync_dist=True",  # the module logs values that are the same on all ranks
    "Checkpoint directory .* exists and is not empty",  # a resumed run continues in its folder
)
_OWN = Path(__file__).parents[1]
_MESSAGES = (
    "litlogger",  # advertisements
    "litmodels",
    "TPU available",
    "GPU available: False",  # another message says if a GPU is not used
    "Detected KeyboardInterrupt",  # `StopOnSignal` has said more
)


def quieten_libraries() -> None:
    """Silence known messages of libraries, and show the others and their bars on our display."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    _show_own_warnings_without_code()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not any(part in record.getMessage() for part in _MESSAGES)
    )
    # At import, bitsandbytes reports that a kernel for AVX512-BF16 is missing. Others replace it.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # transformers imports torchao if it is installed. torchao then reports kernels that are for
    # other machines, and torch warns about the types that torchao registers.
    logging.getLogger("torchao").setLevel(logging.ERROR)
    logging.getLogger("torch.utils._pytree").addFilter(
        lambda record: "register_constant" not in record.getMessage()
    )
    adopt_logs()
    adopt_bars()


def _show_own_warnings_without_code() -> None:
    """Print warnings of lit_ft without a place in its code, which would look like an error."""
    usual = warnings.formatwarning
    if getattr(usual, "__module__", None) == __name__:
        return

    def formatted(message: Any, category: Any, filename: str, lineno: int, line: Any = None) -> str:
        is_ours = Path(filename).is_relative_to(_OWN) or Path(filename) == _OWN.parent / "train.py"
        if is_ours and issubclass(category, UserWarning):
            return f"Warning: {message}\n"
        return usual(message, category, filename, lineno, line)

    warnings.formatwarning = formatted


def outlive_terminal() -> None:
    """Let no text and no end of the terminal fail this process: the run's files matter more.

    Characters that the terminal's encoding lacks are printed as escapes. Where standard output is
    closed, its reader has gone or its disk is full, the rest of the output is lost.
    """
    logging.raiseExceptions = False  # or each line of a log on a full disk prints a traceback
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:  # it is closed, and the next file would take its number
            _become_null(number)
            stream = open(number, "w" if number else "r", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
        elif number and isinstance(stream, io.TextIOWrapper):
            setattr(sys, name, _lasting(stream))


def _lasting(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """Return a stream to the same file descriptor that never raises an error."""
    stream.flush()
    raw: Any = _Lasting(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),
        stream.encoding,
        "backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Lasting(io.FileIO):
    """A file descriptor of the terminal; once it cannot be written to, nothing is."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:  # a broken pipe, a terminal that hung up, a full disk
            _become_null(self.fileno())  # for what libraries write themselves, and child processes
            return memoryview(data).nbytes


def _become_null(number: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null != number:
        os.dup2(null, number)
        os.close(null)
