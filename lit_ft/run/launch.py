"""Start Hydra's program, and say in a line what keeps a job from starting."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, get_args

from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import OmegaConf

from lit_ft.before_libraries import let_waiting_threads_sleep
from lit_ft.compat.refusal import message_on_command_line
from lit_ft.run.arguments import CONF, UNREADABLE, for_hydra, said_by_hydra
from lit_ft.run.command_line import options_of, understood
from lit_ft.run.config import null_choices
from lit_ft.run.console import outlive_terminal
from lit_ft.run.hydra_trust import composer, compositions
from lit_ft.run.implied import with_implied
from lit_ft.run.own_arguments import with_own_arguments
from lit_ft.run.redaction import redact_output
from lit_ft.run.sweep_table import ends_with_sweep_table
from lit_ft.terminal import Style, stage, use_style

_FULL_ERROR = "HYDRA_FULL_ERROR"
# Set while `_raised_by_hydra` has set the other. Jobs in other processes inherit both.
_IS_OURS = "LIT_FT_RAISED_BY_HYDRA"
# The options that print something and end, without a job.
_ANSWERING = {"-h", "--help", "--hydra-help", "--version", "-c", "--cfg", "-i", "--info", "-sc"}
_ANSWERING |= {"--shell-completion", "--save-config"}

_until_job_starts = ExitStack()
_job_has_started = False


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
    let_waiting_threads_sleep()
    arguments = sys.argv[1:]
    _show_start(arguments)
    try:
        command = understood(arguments, config_dir=CONF)
        arguments = command.arguments
        if command.said:
            print(command.said, file=sys.stderr)
        if told := null_choices(arguments, config_dir=CONF):
            sys.exit(told)
        arguments, own = with_own_arguments(arguments)
        if own:
            print(f"resume=auto repeats the run's own arguments: {' '.join(own)}", file=sys.stderr)
        arguments = with_implied(arguments, config_dir=CONF)
        if arguments not in (["--help"], ["-h"]):  # which are read from our own files alone
            arguments = for_hydra(arguments)
        sys.argv[1:] = arguments
        if command.save_config is not None:
            _save_config(command.save_config, arguments)
            return
        with _raised_by_hydra(), ends_with_sweep_table():
            main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (*UNREADABLE, OSError, ValueError) as error:
        if os.environ.get(_FULL_ERROR) == "1":
            raise
        sys.exit(_said(error, arguments))
    except RuntimeError as error:
        # A launcher of Hydra raises it, as submitit does without Slurm. A job's is a bug.
        if _job_has_started or type(error) is not RuntimeError:
            raise
        sys.exit(str(error))
    finally:
        _until_job_starts.close()


def _save_config(file: Path, arguments: list[str]) -> None:
    # Imported here, because most commands do not need it.
    from lit_ft.run.save_config import save_config

    composed = compositions(arguments, config_dir=CONF)
    compose = composer(options_of(arguments), config_dir=CONF)
    save_config(file, composed, compose, conf=CONF)
    print(f"python train.py --config {shlex.quote(str(file))} runs the settings in {file}.")


@contextmanager
def reported_by_hydra() -> Iterator[None]:
    """Let Hydra report the errors of the job in this block as it always does."""
    global _job_has_started
    _job_has_started = True
    _until_job_starts.close()
    is_ours = _IS_OURS in os.environ
    if is_ours:
        _unset()  # other ranks inherit the environment
    try:
        yield
    finally:
        if is_ours and HydraConfig.get().mode == RunMode.MULTIRUN:  # it goes on with its next job
            _set()


def _show_start(arguments: list[str]) -> None:
    """Show that something happens, unless the answer is what the user wants to see alone."""
    if not any(argument.partition("=")[0] in _ANSWERING for argument in arguments):
        use_style(_style_in(arguments))
        _until_job_starts.enter_context(stage("reading the settings"))


def _style_in(arguments: list[str]) -> Style:
    """Return the style that is asked for; a wrong one is refused later, with all settings."""
    asked = [one.removeprefix("ui=") for one in arguments if one.startswith("ui=")][-1:]
    return next((style for style in get_args(Style) if style in asked), "auto")


@contextmanager
def _raised_by_hydra() -> Iterator[None]:
    """Let Hydra raise its errors, which it prints with their tracebacks otherwise."""
    if os.environ.get(_FULL_ERROR) == "1":
        yield
        return
    _set()
    try:
        yield
    finally:
        _unset()


def _set() -> None:
    os.environ[_FULL_ERROR] = os.environ[_IS_OURS] = "1"


def _unset() -> None:
    for name in (_FULL_ERROR, _IS_OURS):
        os.environ.pop(name, None)


def _said(error: Exception, arguments: list[str]) -> str:
    """Return the message of an error of Hydra, of the machine, or of a check of the arguments."""
    if type(error) is CompactHydraException:  # of a sweep's job; see lit_ft.run.exits
        return (
            f"{error}\n\nSet the environment variable {_FULL_ERROR}=1 for a complete stack trace."
        )
    if isinstance(error, MissingConfigException):  # an OSError too, but not of the machine
        return said_by_hydra(error, arguments)
    of_machine = error if isinstance(error, OSError) else error.__cause__
    if isinstance(of_machine, OSError):  # Hydra makes the folder, and opens the log in it
        said = message_on_command_line(of_machine)
        return f"run_dir cannot be used: {said}" if _is_of_run_dir(of_machine, arguments) else said
    if isinstance(error, UNREADABLE):
        return said_by_hydra(error, arguments)
    return str(error)


def _is_of_run_dir(error: OSError, arguments: list[str]) -> bool:
    """Whether an error is one of the run's folder, of what is in it, or of a folder above it."""
    if error.filename is None:
        return False
    try:
        composed: Any = OmegaConf.to_container(compositions(arguments, config_dir=CONF)[0])
        fixed = str(composed["run_dir"]).partition("${")[0]  # the default one ends with the time
    except (*UNREADABLE, OSError, ValueError, LookupError):
        return False  # a configuration that cannot be read is itself at fault
    folder, place = Path(fixed).absolute(), Path(os.fsdecode(error.filename)).absolute()
    return place.is_relative_to(folder) or folder.is_relative_to(place)
