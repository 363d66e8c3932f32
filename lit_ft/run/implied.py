"""Settings that follow from others, as people expect them to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from lit_ft.run.override import name_of

_STEPS, _EPOCHS = "trainer.max_steps", "trainer.max_epochs"

LENGTH = {_STEPS, _EPOCHS}
"""The settings that say how long a run is."""

_OWN_DATA = {"data.path", "data.sources"}
_OPTIMIZERS = {"optim", "galore", "adapter", "experiment"}
_OTHER_LENGTHS = {"debug", "hparams_search", "trainer.max_time", "trainer"}
_UNREADABLE = (OSError, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError)
_NO_LIMIT = (None, "null", "None", "-1")


def with_implied(arguments: Sequence[str], *, config_dir: Path) -> list[str]:
    """Return the arguments for Hydra with the settings that they imply.

    A number of epochs alone lets no number of steps end the run before. A run on data of one's own
    is one epoch, unless a length is given: on the command line, or in the file of an experiment or
    of this machine. A choice of callbacks is added to the default ones. Block updates bring AdamW
    in the place of GaLore, which does not go with them.

    Args:
        arguments: The arguments, in Hydra's form.
        config_dir: The folder that holds train.yaml.

    Raises:
        ValueError: If a sweep has updates with and without blocks, and names no optimizer.
    """
    whole = [with_default_callbacks(one, config_dir=config_dir) for one in arguments]
    settings = {name_of(one): one.partition("=")[2] for one in whole if not one.startswith("-")}
    files = [
        _of_choice(settings.get(group, default), config_dir / group)
        for group, default in (("experiment", "null"), ("local", "default"))
    ]
    # Hydra takes its settings in one piece: options stay in front of them.
    first = next((place for place, one in enumerate(whole) if _is_setting(one)), 0)
    implied = [*_length(settings, files), *_optimizer(settings)]
    return [*whole[:first], *implied, *whole[first:]]


def with_default_callbacks(argument: str, *, config_dir: Path) -> str:
    """Return a choice of callbacks with the default ones added, and another argument as it is.

    Args:
        argument: The argument, in which a sweep may have several choices.
        config_dir: The folder that holds train.yaml.
    """
    group, _, chosen = argument.partition("=")
    names = chosen.split(",")
    if group != "callbacks" or not all((config_dir / group / f"{n}.yaml").is_file() for n in names):
        return argument
    whole = (name if name in ("default", "none") else f"[default,{name}]" for name in names)
    return f"{group}={','.join(whole)}"


def _optimizer(typed: Mapping[str, str]) -> Iterator[str]:
    """Yield the optimizer of block updates, unless what is typed chooses one."""
    updates = typed.get("update", "")
    if "blocks" not in updates or any(typed.get(one, "null") != "null" for one in _OPTIMIZERS):
        return
    have_blocks = {"blocks" in one for one in _choices("update", updates)}
    if have_blocks == {True, False}:  # what is implied would hold for all jobs of the sweep
        raise ValueError(
            f"update={updates}: alone, update=blocks brings optim=adamw, and the others do "
            "not. Add optim=adamw, with which all runs of this sweep then train, or compare each "
            "with its own optimizer: python -m lit_ft.compare -m."
        )
    if True in have_blocks:
        yield "optim=adamw"


def _choices(group: str, value: str) -> list[list[str]]:
    """Return the names in each choice of a group; a sweep has several choices."""
    try:
        override = OverridesParser.create().parse_override(f"{group}={value}")
        several = list(override.sweep_string_iterator()) if override.is_choice_sweep() else [value]
    except HydraException:  # Hydra will say what is wrong with it
        several = [value]
    return [str(one).strip("[]").split(",") for one in several]


def _length(typed: Mapping[str, str], files: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """Yield the settings of the length that follow from what is typed, and from files."""
    for place in (typed, *files):  # each wins over those after it
        if place.get(_STEPS) not in _NO_LIMIT:
            return
        if place.get(_EPOCHS) not in _NO_LIMIT:
            if _STEPS not in typed:
                yield f"{_STEPS}=-1"
            return
        if not place.keys().isdisjoint(_OTHER_LENGTHS):
            return
    is_stream = typed.get("data.streaming", "false").lower() == "true"
    if not (typed.keys().isdisjoint(_OWN_DATA) or is_stream or _EPOCHS in typed):
        yield f"{_EPOCHS}=1"
        if _STEPS not in typed:
            yield f"{_STEPS}=-1"


def _of_choice(chosen: str, folder: Path) -> dict[str, str]:
    """Return what the chosen files of a group set of the trainer, keyed by name."""
    found: dict[str, str] = {}
    for name in chosen.strip("[]").split(","):
        file = folder / f"{name}.yaml"
        if name in ("", "null") or (folder.name == "local" and not file.is_file()):
            continue
        try:
            found |= {f"trainer.{key}": str(value) for key, value in _of_trainer(file).items()}
        except _UNREADABLE:  # it is elsewhere, or Hydra will say what is wrong with it
            found["trainer"] = "unknown"
    return found


def _of_trainer(file: Path) -> dict[str, Any]:
    """Return what a file, and those of its folder from which it starts, set of the trainer."""
    said = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    found: dict[str, Any] = {}
    for entry in said.get("defaults") or []:
        if isinstance(entry, str) and entry != "_self_":
            found |= _of_trainer(file.parent / f"{entry}.yaml")
        elif "override /trainer" in entry:
            raise ValueError(f"{file} chooses another trainer.")
    return found | (said.get("trainer") or {})


def _is_setting(argument: str) -> bool:
    return "=" in argument and not argument.startswith("-")
