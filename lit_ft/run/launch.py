"""Start Hydra's program, and say in a line what keeps a job from starting."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from lit_ft.compat.refusal import message_on_command_line
from lit_ft.run.arguments import CONF, for_hydra
from lit_ft.run.config import names_near, null_choices
from lit_ft.run.console import outlive_terminal
from lit_ft.run.own_arguments import with_own_arguments
from lit_ft.run.redaction import redact_output

_FULL_ERROR = "HYDRA_FULL_ERROR"
_ours: list[bool] = []  # not empty while `_raised_by_hydra` has set the variable


def launch(main: Callable[[], Any]) -> None:
    """Run Hydra's `main` with the arguments of this process.

    Hydra prints a traceback for whatever goes wrong before the job begins, such as a run_dir that
    cannot be made. Here it is one line, unless HYDRA_FULL_ERROR=1 asks for the traceback.

    Args:
        main: The function that `hydra.main` has decorated. Its job is inside `reported_by_hydra`.

    Raises:
        SystemExit: With a message or with code 1 if the job does not begin or fails, and with code
            130 after Ctrl-C.
    """
    outlive_terminal()
    redact_output()
    arguments = sys.argv[1:]
    try:
        if told := null_choices(arguments, config_dir=CONF):
            sys.exit(told)
        arguments, own = with_own_arguments(arguments)
        if own:
            print(f"resume=auto repeats the run's own arguments: {' '.join(own)}", file=sys.stderr)
        arguments = sys.argv[1:] = for_hydra(arguments)
        with _raised_by_hydra():
            main()
    except SystemExit as stop:
        if stop.code == 1:
            print(names_near(arguments, config_dir=CONF), file=sys.stderr, end="")
        raise
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (HydraException, OmegaConfBaseException, OSError, ValueError) as error:
        if os.environ.get(_FULL_ERROR) == "1":
            raise
        sys.exit(_said(error, arguments))


@contextmanager
def reported_by_hydra() -> Iterator[None]:
    """Let Hydra report the errors of the job in this block as it always does."""
    ours = _ours.pop() if _ours else None
    if ours:
        os.environ.pop(_FULL_ERROR, None)  # other ranks inherit the environment
    yield
    if ours:  # a sweep goes on with its next job
        os.environ[_FULL_ERROR] = "1"
        _ours.append(ours)


@contextmanager
def _raised_by_hydra() -> Iterator[None]:
    """Let Hydra raise its errors, which it prints with their tracebacks otherwise."""
    if os.environ.get(_FULL_ERROR) == "1":
        yield
        return
    os.environ[_FULL_ERROR] = "1"
    _ours.append(True)
    try:
        yield
    finally:
        os.environ.pop(_FULL_ERROR, None)
        _ours.clear()


def _said(error: Exception, arguments: list[str]) -> str:
    """Return the message of an error of Hydra, of the machine, or of a check of the arguments."""
    of_machine = error if isinstance(error, OSError) else error.__cause__
    if isinstance(of_machine, OSError):  # Hydra makes the folder, and opens the log in it
        return f"run_dir cannot be used: {message_on_command_line(of_machine)}"
    if isinstance(error, HydraException | OmegaConfBaseException):
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else ""
        lines = [str(error), str(cause), names_near(arguments, config_dir=CONF).rstrip()]
        return "\n".join(filter(None, lines))
    return str(error)
