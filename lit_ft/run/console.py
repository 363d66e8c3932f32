"""Keep libraries' messages off the terminal, and exit with the codes that a shell expects."""

from __future__ import annotations

import logging
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from hydra.errors import CompactHydraException, InstantiationException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_ft.compat.refusal import message_on_command_line

# A user of lit_ft cannot act on these: they are mostly deprecations between libraries.
_WARNINGS = (
    "'set_vital' is deprecated",  # torchdata calls torch
    "`isinstance\\(treespec, LeafSpec\\)`",  # lightning calls torch
    "`torch.jit.script",  # torch calls itself
    "`is_gradient_checkpointing` is deprecated",  # peft calls transformers
    "PiSSA changes the base weights",  # exported as an adapter for the original ones
    ".*does not have many workers",  # tokenised data is read from a memory map
    ".*sync_dist=True",  # the module logs values that are the same on all ranks
    "Checkpoint directory .* exists and is not empty",  # a resumed run continues in its folder
)
_MESSAGES = (
    "litlogger",  # advertisements
    "litmodels",
    "TPU available",
    "GPU available: False",  # Lightning says so itself if a GPU exists and is not used
)


def quieten_libraries() -> None:
    """Silence known messages of libraries, and progress bars if stderr is not a terminal."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not any(part in record.getMessage() for part in _MESSAGES)
    )
    # At import, bitsandbytes reports that a kernel for AVX512-BF16 is missing. Others replace it.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # transformers imports torchao if it is installed. torchao then reports kernels that are for
    # other machines, and torch warns of the types that torchao registers.
    logging.getLogger("torchao").setLevel(logging.ERROR)
    logging.getLogger("torch.utils._pytree").addFilter(
        lambda record: "register_constant" not in record.getMessage()
    )
    if not sys.stderr.isatty():
        from datasets.utils.logging import disable_progress_bar
        from transformers.utils import logging as transformers_logging

        disable_progress_bar()
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def command_line_exits() -> Iterator[None]:
    """Turn the exceptions that end a run into the exit codes that a shell expects of a command.

    Raises:
        SystemExit: With code 130 after Ctrl-C and 143 after SIGTERM, the usual codes for these
            signals.
        CompactHydraException: If the run fails for a reason that the user can act on, such as a
            wrong setting. Hydra prints only the message, runs the rest of a sweep, and exits with
            code 1. HYDRA_FULL_ERROR=1 adds the traceback.
    """
    try:
        yield
    except SIGTERMException:
        sys.exit(128 + signal.SIGTERM)
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning turns Ctrl-C into SystemExit(1).
        if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        sys.exit(128 + signal.SIGINT)
    except (
        ValueError,
        FileNotFoundError,
        FloatingPointError,
        MisconfigurationException,
        InstantiationException,
        torch.OutOfMemoryError,
    ) as error:
        cause: BaseException = error
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            cause = cause.__cause__
        said = message_on_command_line(cause)
        raise CompactHydraException(f"\n{type(cause).__name__}: {said}") from error
