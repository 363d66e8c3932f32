"""The arguments of a resumed run: those in its folder, unless the command line changes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from lit_ft.run.record import FOLDER, OVERRIDES

# These say what one start does. The rest says what the run is.
_OF_ONE_START = {"run_dir", "resume", "overwrite", "validate_only"}
# A file does not authorise itself: what these trust must be trusted again.
_TRUST = ("trusted_packages", "trust_remote_code")


def with_own_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments with those of the run that `resume=auto` goes on with in front of them.

    Args:
        arguments: The arguments of the command line.

    Returns:
        The arguments for Hydra, and those of the run that the command line does not repeat.
    """
    given = {_name(one): one.partition("=")[2] for one in arguments if not one.startswith("-")}
    swept = any(one in ("-m", "--multirun") for one in arguments)
    if swept or given.get("resume") != "auto" or "run_dir" not in given:
        return list(arguments), []
    own = [one for one in _recorded(Path(given["run_dir"].strip("'\""))) if _is_of_run(one, given)]
    return [*own, *arguments], own


def _is_of_run(argument: str, given: dict[str, str]) -> bool:
    name = _name(argument)
    return (
        name not in {*given, *_OF_ONE_START}
        and not any(trust in argument for trust in _TRUST)
        and not name.startswith("hydra")
    )


def _recorded(run_dir: Path) -> list[str]:
    """Return the arguments of the newest start that has trained; empty if none is known."""
    record = run_dir / FOLDER
    numbers = [int(one.parent.name) for one in record.glob(f"[0-9]*/{OVERRIDES}")]
    newest = [record / str(number) for number in sorted(numbers, reverse=True)]
    for folder in (*newest, record):
        if (folder / "summary.json").exists():
            continue  # it has only validated
        try:
            found = OmegaConf.to_container(OmegaConf.load(folder / OVERRIDES), resolve=False)
        except (OSError, ValueError, YAMLError, OmegaConfBaseException):
            continue
        if isinstance(found, list):
            return [one for one in found if isinstance(one, str)]
    return []


def _name(argument: str) -> str:
    """Return the name that an argument sets, such as `optim` for `optim=adamw` and `~optim`."""
    return argument.lstrip("+~").partition("=")[0].partition("@")[0]
