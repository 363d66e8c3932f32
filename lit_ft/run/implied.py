"""Settings that follow from others, as people expect them to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

LENGTH = {"trainer.max_steps", "trainer.max_epochs"}
"""The settings that say how long a run is."""

_OWN_DATA = {"data.path", "data.sources"}
_OTHER_LENGTHS = {"experiment", "debug", "hparams_search", "trainer.max_time", "trainer"}


def with_implied(arguments: Sequence[str], *, config_dir: Path) -> list[str]:
    """Return the arguments for Hydra with the settings that they imply.

    A number of epochs alone lets no number of steps end the run before. A run on data of one's own
    is one epoch, unless a length is given. A choice of callbacks is added to the default ones.

    Args:
        arguments: The arguments, in Hydra's form.
        config_dir: The folder that holds train.yaml.
    """
    whole = [_with_default_callbacks(one, config_dir) for one in arguments]
    settings = {_name(one): one.partition("=")[2] for one in whole if not one.startswith("-")}
    # Hydra takes its settings in one piece: options stay in front of them.
    first = next((place for place, one in enumerate(whole) if _is_setting(one)), 0)
    return [*whole[:first], *_length(settings), *whole[first:]]


def _length(settings: Mapping[str, str]) -> Iterator[str]:
    """Yield the settings of the length that follow from the others."""
    if "trainer.max_steps" in settings:
        return
    if settings.get("trainer.max_epochs", "null") != "null":
        yield "trainer.max_steps=-1"
    elif (
        not settings.keys().isdisjoint(_OWN_DATA)
        and settings.keys().isdisjoint({*LENGTH, *_OTHER_LENGTHS})
        and settings.get("data.streaming", "false").lower() != "true"
    ):
        yield "trainer.max_epochs=1"
        yield "trainer.max_steps=-1"


def _with_default_callbacks(argument: str, config_dir: Path) -> str:
    group, _, chosen = argument.partition("=")
    alone = {"default", "none", "null", ""}
    known = group == "callbacks" and (config_dir / "callbacks" / f"{chosen}.yaml").is_file()
    return f"callbacks=[default,{chosen}]" if known and chosen not in alone else argument


def _is_setting(argument: str) -> bool:
    return "=" in argument and not argument.startswith("-")


def _name(argument: str) -> str:
    return argument.lstrip("+~").partition("=")[0]
