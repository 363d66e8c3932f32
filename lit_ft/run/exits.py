"""Exit with the codes that a shell expects, and with a message if a traceback would not help."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from hydra.errors import CompactHydraException, InstantiationException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_ft.callbacks.pruning import is_pruned
from lit_ft.callbacks.stop import SIGHUPException, ended_by_signals
from lit_ft.compat.refusal import message_on_command_line
from lit_ft.run.redaction import redacted_text


@contextmanager
def command_line_exits() -> Iterator[None]:
    """Turn the exceptions that end a run into the exit codes that a shell expects of a command.

    Raises:
        SystemExit: With code 130 after Ctrl-C, 143 after SIGTERM and 129 after SIGHUP, the usual
            codes for these signals. They end the block wherever it is, and its clean-up runs.
        CompactHydraException: If the run fails for a reason that the user can act on, such as a
            wrong setting. Hydra prints only the message, runs the rest of a sweep, and exits with
            code 1. HYDRA_FULL_ERROR=1 adds the traceback. A run that is pruned has not failed.
    """
    try:
        with ended_by_signals():
            yield
    except SIGHUPException:
        sys.exit(128 + signal.SIGHUP)
    except SIGTERMException:
        sys.exit(128 + signal.SIGTERM)
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning turns Ctrl-C into SystemExit(1).
        if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        sys.exit(128 + signal.SIGINT)
    except (
        ValueError,
        OSError,
        FloatingPointError,
        MisconfigurationException,
        InstantiationException,
        torch.OutOfMemoryError,
    ) as error:
        cause = unwrapped(error)
        said = redacted_text(message_on_command_line(cause))
        raise CompactHydraException(f"\n{type(cause).__name__}: {said}") from error
    except Exception as error:
        if not is_pruned(error):
            raise


def unwrapped(error: BaseException) -> BaseException:
    """Return the error of a constructor, without the one in which Hydra wraps it."""
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    return error
