"""A terminal that shows the run, not the libraries' asides, and ends as the shell expects."""

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

# Nothing that a user of lit_ft could act on: deprecations between libraries, and an advertisement.
_WARNINGS = (
    "'set_vital' is deprecated",  # torchdata calls torch
    "`isinstance\\(treespec, LeafSpec\\)`",  # lightning calls torch
    "`torch.jit.script",  # torch calls itself
    "`is_gradient_checkpointing` is deprecated",  # peft calls transformers
    "PiSSA changes the base weights",  # exported as an adapter for the original ones
    ".*does not have many workers",  # tokenised data is read from a memory map
    ".*sync_dist=True",  # the module logs what is the same on all ranks
    "Checkpoint directory .* exists and is not empty",  # a resumed run goes on in its folder
)
_MESSAGES = (
    "litlogger",  # advertisements
    "litmodels",
    "TPU available",
    "GPU available: False",  # what there is, Lightning says if it is not used
)


def quieten_libraries() -> None:
    """Silence known asides, and progress bars where they would not be drawn but printed."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not any(part in record.getMessage() for part in _MESSAGES)
    )
    # It says at import that one kernel for AVX512-BF16 is missing; the others do.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # transformers imports torchao where it is installed; that says which kernels are for other
    # machines, and torch warns of what it registers.
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
    """Turn what ends a run into what a shell expects of a command.

    Raises:
        SystemExit: 130 after Ctrl-C and 143 after SIGTERM, as for any program that they end.
        CompactHydraException: A setting that cannot work. Hydra prints its message alone, with the
            traceback under HYDRA_FULL_ERROR=1, exits with 1, and goes on with the rest of a sweep.
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
