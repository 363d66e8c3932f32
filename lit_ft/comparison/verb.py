"""What the verbs that train several runs share: their arguments, their folder and their errors."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from lit_ft.comparison.shown import say
from lit_ft.compat.refusal import message_on_command_line
from lit_ft.run.arguments import CONF, UNREADABLE, quoted_paths, why_unreadable
from lit_ft.run.command_line import understood
from lit_ft.run.config import choices_near
from lit_ft.run.files import LOCK
from lit_ft.run.override import name_of
from lit_ft.run.redaction import redacted_text
from lit_ft.run.verb_parser import parser_of_settings, whole_number

_SEARCHES = "hparams_search"


def parser_of_runs(prog: str, description: str | None, *, example: str) -> argparse.ArgumentParser:
    """Return a parser of settings that also reads `jobs`; see `parser_of_settings`."""
    parser = parser_of_settings(prog, description, example=example)
    parser.add_argument(
        "-m",
        "--multirun",
        action="store_true",
        help="changes nothing: several values are a sweep, as with train.py -m",
    )
    parser.add_argument(
        "--jobs",
        type=whole_number(1),
        default=1,
        metavar="N",
        help="runs that train at a time, each with a GPU or a part of the cores of its own (1)",
    )
    return parser


def settings_and_folder(arguments: Sequence[str], default: Path) -> tuple[list[str], Path]:
    """Return the settings of the runs in Hydra's form, and the folder to train them in.

    A file of `hparams_search` stands for the values that it names.

    Args:
        arguments: The arguments as they were typed.
        default: The folder without `run_dir`.

    Raises:
        HydraException: If `run_dir` is not in Hydra's grammar.
        ValueError: If an argument is wrong.
    """
    folder, settings = default, []
    for argument in quoted_paths(understood(arguments, config_dir=CONF).arguments):
        name = name_of(argument)
        if name == "run_dir":
            folder = Path(str(OverridesParser.create().parse_override(argument).value()))
        elif name == _SEARCHES:
            settings += _values_of(argument)
        else:
            settings.append(argument)
    return settings, folder


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder of several runs in the block.

    Raises:
        ValueError: If another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / LOCK, timeout=0):
            yield
    except Timeout as error:
        raise ValueError(f"{folder}: another process trains in it.") from error


@contextmanager
def errors_end_the_verb() -> Iterator[None]:
    """End the process with a message if the block fails, and with Ctrl-C's status if stopped."""
    try:
        yield
    except UNREADABLE as error:
        sys.exit(redacted_text(why_unreadable(error)))
    except (ValueError, OSError) as error:
        sys.exit(redacted_text(message_on_command_line(error)))
    except KeyboardInterrupt:
        say("Stopped. The same command goes on with what is left.")
        sys.exit(128 + signal.SIGINT)


def _values_of(argument: str) -> list[str]:
    """Return the values that a file of `hparams_search` names, as settings."""
    choice = argument.partition("=")[2]
    file = CONF / _SEARCHES / f"{choice}.yaml"
    if not file.is_file():
        near = choices_near(_SEARCHES, choice, config_dir=CONF)
        raise ValueError(f"{argument}: there is no such choice. {near}")
    params = OmegaConf.select(OmegaConf.load(file), "hydra.sweeper.params") or {}
    return [f"{name}={values}" for name, values in params.items()]
