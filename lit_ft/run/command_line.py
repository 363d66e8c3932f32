"""Turn what people type into arguments for Hydra: files of settings, and names they know.

`--config my.yaml` becomes the settings of the file, in front of those of the command line, which
win. `--optim.lr 1e-4` becomes `optim.lr=1e-4`. Names of other trainers become the settings that
mean the same, see `lit_ft.run.other_trainers`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lit_ft.run.config import names_near
from lit_ft.run.config_file import Setting, set_twice, settings_of_file
from lit_ft.run.hydra_trust import composer
from lit_ft.run.implied import with_default_callbacks
from lit_ft.run.other_trainers import BY_NAME
from lit_ft.run.translation import translated

CONFIG, SAVE = "--config", "--save-config"

# Hydra's own options, and whether a value follows them.
_OF_HYDRA = {
    "--help": False,
    "--hydra-help": False,
    "--version": False,
    "--cfg": True,
    "--resolve": False,
    "--package": True,
    "--run": False,
    "--multirun": False,
    "--shell-completion": False,
    "--config-path": True,
    "--config-name": True,
    "--config-dir": True,
    "--experimental-rerun": True,
    "--info": True,
}
_SHORT = ("-c", "-p", "-i", "-cp", "-cn", "-cd")  # those that a value follows
_SETTING = re.compile(r"[+~]*[A-Za-z_][\w./@:-]*=|~")
_NUMBER = re.compile(r"-[\d.]")


@dataclass(frozen=True)
class CommandLine:
    """A command line for Hydra.

    Args:
        arguments: The arguments for Hydra.
        save_config: The file to write the settings to, in place of a run; None without any.
        said: What was understood in place of names of other trainers; empty without any.
    """

    arguments: list[str]
    save_config: Path | None = None
    said: str = ""


def understood(arguments: Sequence[str], *, config_dir: Path) -> CommandLine:
    """Return what Hydra can take in place of what a person has typed.

    Args:
        arguments: The arguments of the command line.
        config_dir: The folder that holds train.yaml.

    Raises:
        ValueError: If a file of settings is at fault, or if nothing means what was typed.
    """
    words = _Words(arguments, config_dir)
    typed: list[Setting] = []
    said: list[str] = []
    faults: list[str] = []
    for word in words.settings:
        try:
            found = _of_one(word)
        except ValueError as error:
            faults.append(str(error))
            continue
        typed += found
        if (new := [one.argument for one in found]) != [word]:
            said.append(f"{word.lstrip('+')} is {' '.join(new) or 'nothing to set'}")
    faults += set_twice(typed)
    if faults:
        raise ValueError("\n".join(faults))
    if not (said or words.is_changed):
        return CommandLine(list(arguments))
    settings = _of_files(words, typed, config_dir)
    return CommandLine(
        [*(one.argument for one in settings), *words.options],
        words.save_config,
        f"Here, {'; '.join(said)}." if said else "",
    )


def options_of(arguments: Sequence[str]) -> list[str]:
    """Return Hydra's options among arguments for Hydra, with their values."""
    return [one for one in arguments if not _SETTING.match(one)]


def _of_one(word: str) -> list[Setting]:
    """Return the settings that a setting stands for, itself if it is one of ours."""
    name, assigned, value = word.partition("=")
    found = translated(name.lstrip("+"), value) if assigned else None
    if found is None:
        return [Setting(word, word)]
    settings = [Setting(one, word) for one in found.settings]
    return settings + [Setting(one, word, is_implied=True) for one in found.brings]


def _of_files(words: _Words, typed: Sequence[Setting], config_dir: Path) -> list[Setting]:
    """Return the settings of all files and of the command line, each only where it decides."""
    # Of a sweep, the first choice tells which names there are.
    choices = [
        with_default_callbacks(
            one.argument if "[" in one.argument else one.argument.partition(",")[0],
            config_dir=config_dir,
        )
        for one in typed
        if (config_dir / one.name).is_dir() or one.name == "hydra.searchpath"
    ]
    chosen = list({choice.partition("=")[0]: choice for choice in choices}.values())
    places: list[Sequence[Setting]] = []
    compose = composer(words.options, config_dir=config_dir)
    for path in words.files:
        places.append(settings_of_file(path, compose, chosen, config_dir=config_dir))
    places.append(typed)
    return _merged(places)


def _merged(places: Sequence[Sequence[Setting]]) -> list[Setting]:
    """Return the settings of several places, in which a later place wins over an earlier one."""
    decided: list[Setting] = []
    for place in reversed(places):
        winners = {one.name: one for one in decided}
        own = [one for one in place if not one.is_implied and not _gives_way(one, winners)]
        decided = [*{one.argument: one for one in own}.values(), *decided]
    names = {one.name for one in decided}
    implied = [one for place in places for one in place if one.is_implied]
    return [*{one.name: one for one in implied if one.name not in names}.values(), *decided]


def _gives_way(one: Setting, winners: Mapping[str, Setting]) -> bool:
    winner = winners.get(one.name)
    # What adds a name stays, if the other one changes or removes what is there.
    stays = one.argument.startswith("+") and winner and not winner.argument.startswith("+")
    return winner is not None and not stays


class _Words:
    """The words of a command line by their kinds.

    Attributes:
        settings: Those of Hydra's form, with options such as `--optim.lr 1e-4` among them.
        options: Hydra's own options, with their values.
        files: The files of `--config`.
        save_config: The file of `--save-config`.
        is_changed: Whether Hydra would not understand the arguments as they are.
    """

    def __init__(self, arguments: Sequence[str], config_dir: Path) -> None:
        self.settings: list[str] = []
        self.options: list[str] = []
        self.files: list[Path] = []
        self.save_config: Path | None = None
        self.is_changed = False
        self._comes_after_settings = False  # an option
        self._config_dir = config_dir
        self._left = list(arguments)
        while self._left:
            self._take(self._left.pop(0))

    def _take(self, word: str) -> None:
        option, assigned, value = word.partition("=")
        if option in (CONFIG, SAVE):
            self._take_file(option, value)
        elif word.startswith("--") and not self._is_of_hydra(option):
            self._take_setting(option, value if assigned else None)
        elif word.startswith("-"):
            self._comes_after_settings = bool(self.settings)
            self.options.append(word)
            takes_one = _OF_HYDRA.get(option, option in _SHORT)
            if takes_one and not assigned and self._left and not _is_option(self._left[0]):
                self.options.append(self._left.pop(0))
        elif not _SETTING.match(word) and word.endswith((".yaml", ".yml")):
            raise ValueError(f"Settings of a file: {CONFIG} {word}, not {word} alone.")
        else:
            self.is_changed |= self._comes_after_settings  # Hydra takes settings in one piece
            self.settings.append(word)

    def _take_file(self, option: str, value: str) -> None:
        self.is_changed = True
        if not value and self._left and not _is_option(self._left[0]):
            value = self._left.pop(0)
        if not value:
            raise ValueError(f"{option} needs a file: {option} my.yaml")
        if option == CONFIG:
            self.files.append(Path(value).expanduser())
        else:
            self.save_config = Path(value).expanduser()

    def _take_setting(self, option: str, value: str | None) -> None:
        """Take an option such as `--optim.lr 1e-4`, whose value is true if none follows."""
        self.is_changed = True
        typed = option.removeprefix("--")
        name = typed.replace("-", "_")
        if name not in BY_NAME and (near := names_near([f"{name}=x"], config_dir=self._config_dir)):
            root = name.partition(".")[0]
            if f"there is no '{root}'" in near:
                raise ValueError(near.strip().replace(name, option, 1))
        if value is None:
            values = []
            while (one := self._next_value()) is not None:
                values.append(one)
            value = values[0] if len(values) == 1 else f"[{','.join(values)}]" if values else "true"
        self.settings.append(f"{name}={value}")

    def _next_value(self) -> str | None:
        """Take the next word if it is the value of an option; None if there is none."""
        if not self._left or _is_option(self._left[0]) or _SETTING.match(self._left[0]):
            return None
        return self._left.pop(0)

    def _is_of_hydra(self, option: str) -> bool:
        """Whether an option is one of Hydra's, which may be shortened."""
        is_name = option.removeprefix("--") in BY_NAME
        return not is_name and any(one.startswith(option) for one in _OF_HYDRA)


def _is_option(word: str) -> bool:
    return word.startswith("-") and _NUMBER.match(word) is None
