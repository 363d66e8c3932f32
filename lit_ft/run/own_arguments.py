"""The arguments of a resumed run: those in its folder, unless the command line changes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lit_ft.run.files import SUMMARY
from lit_ft.run.implied import LENGTH
from lit_ft.run.override import bare_name_of
from lit_ft.run.record import FOLDER, OVERRIDES, numbered
from lit_ft.run.redaction import OWN_VARIABLES
from lit_ft.run.trust import gives_trust

OF_ONE_START = {"run_dir", "resume", "overwrite", "validate_only"}
"""The settings that say what one start does. The rest says what the run is."""


def with_own_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments with those of the run that `resume=auto` goes on with in front of them.

    The run's folder is data, perhaps a stranger's. Only settings of a job are taken from it: no
    options, such as `--config-dir`, no settings of Hydra, and nothing that gives trust.

    Args:
        arguments: The arguments of the command line.

    Returns:
        The arguments for Hydra, and those of the run that the command line does not repeat.
    """
    given = {
        bare_name_of(one): one.partition("=")[2] for one in arguments if not one.startswith("-")
    }
    swept = any(one in ("-m", "--multirun") for one in arguments)
    if swept or given.get("resume") != "auto" or "run_dir" not in given:
        return list(arguments), []
    own = [one for one in _recorded(Path(given["run_dir"].strip("'\""))) if _is_of_run(one, given)]
    if not LENGTH.isdisjoint(given):  # another length, in steps or epochs, replaces the run's own
        own = [one for one in own if bare_name_of(one) not in LENGTH]
    # Hydra takes its settings in one piece: options stay in front of them.
    first = next(place for place, one in enumerate(arguments) if "=" in one and one[0] != "-")
    return [*arguments[:first], *own, *arguments[first:]], own


def _is_of_run(argument: str, given: dict[str, str]) -> bool:
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException:
        return False
    # `logger@hydra.job_logging=x` sets what is Hydra's, too.
    places = (override.key_or_group, override.package or "")
    return (
        not argument.startswith("-")  # some options are settings in Hydra's grammar
        and not override.is_sweep_override()
        and not any(place.startswith("hydra") for place in places)
        and not gives_trust(argument)
        and not _is_secret_of_file(argument)
        and bare_name_of(argument) not in {*given, *OF_ONE_START}
    )


def _is_secret_of_file(argument: str) -> bool:
    """Whether an argument stands for a secret that a configuration file holds, perhaps still."""
    return argument.startswith("++") and OWN_VARIABLES in argument


def _recorded(run_dir: Path) -> list[str]:
    """Return the arguments of the newest start that has trained; empty if none is known."""
    newest = [folder for _, folder in reversed(numbered(run_dir))]
    for folder in (*newest, run_dir / FOLDER):
        if (folder / SUMMARY).exists() or not (folder / OVERRIDES).is_file():
            continue  # it has only validated, or is no record
        try:
            found = OmegaConf.to_container(OmegaConf.load(folder / OVERRIDES), resolve=False)
        except (OSError, ValueError, RecursionError, YAMLError, OmegaConfBaseException):
            continue
        if isinstance(found, list):
            return [one for one in found if isinstance(one, str)]
    return []
