"""Read a file of settings, which `--config` names, as arguments of the command line.

The file is a mapping. A name is written with dots (`optim.lr: 1e-4`) or as a mapping in a mapping.
A text or a list at the place of a folder of conf/ makes a choice: `optim: adamw_8bit`. As on the
command line, a plus in front of a name adds what no file of conf/ lists, and a tilde leaves it out.
Names of other trainers are translated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lit_ft.run.config import choices_near, names_near, null_choices
from lit_ft.run.hidden import in_grammar
from lit_ft.run.implied import with_default_callbacks
from lit_ft.run.other_trainers import BY_NAME
from lit_ft.run.override import bare_name_of
from lit_ft.run.translation import translated
from lit_ft.run.trust import TRUST, gives_trust

_NAME = re.compile(r"[+~]?[A-Za-z_][\w-]*([./][\w-]+)*")
_CHOICE = re.compile(r"\w[\w-]*(/\w[\w-]*)*")

Compose = Callable[[Sequence[str]], Any]
"""Composes a configuration from arguments."""


@dataclass(frozen=True)
class Setting:
    """One setting, as an argument of the command line.

    Args:
        argument: The argument, such as `optim.lr=0.0001`.
        source: What it comes from, such as `my.yaml:3`.
        is_implied: Whether it gives way to what the user sets.
    """

    argument: str
    source: str
    is_implied: bool = False

    @property
    def name(self) -> str:
        """The name that is set, such as `optim.lr` for `++optim.lr=1`."""
        return bare_name_of(self.argument)


def settings_of_file(
    path: Path, compose: Compose, choices: Sequence[str], *, config_dir: Path
) -> list[Setting]:
    """Return the settings of a file.

    Args:
        path: The file.
        compose: Composes the configuration in which the names are looked up.
        choices: The choices of the command line, which win over those of the file.
        config_dir: The folder that holds train.yaml.

    Raises:
        ValueError: With a line for each fault of the file.
    """
    return _Reader(path, config_dir).settings(compose, choices)


def set_twice(settings: Iterable[Setting]) -> Iterator[str]:
    """Yield a message for each setting that an earlier one sets to another value.

    What the command line itself sets twice is left to Hydra, which takes the last one.
    """
    seen: dict[str, Setting] = {}
    for one in settings:
        if one.is_implied:
            continue
        first = seen.setdefault(one.name, one)
        is_typed = first.source == first.argument
        if one.argument != first.argument and not (is_typed and one.source == one.argument):
            place = "" if is_typed else f" from {first.source}"
            yield f"{one.source}: {one.argument} contradicts {first.argument}{place}."


@dataclass(frozen=True)
class _Entry:
    """A name of the file, with a dot or slash between its parts, its value, and its line."""

    name: str
    value: Any
    line: int

    @property
    def sign(self) -> str:
        return self.name[0] if self.name[0] in "+~" else ""

    @property
    def plain(self) -> str:
        return self.name.removeprefix(self.sign)


class _Reader:
    """Reads one file, and keeps its faults until all are found."""

    def __init__(self, path: Path, config_dir: Path) -> None:
        self.path = path
        self.config_dir = config_dir
        self.faults: list[str] = []

    def settings(self, compose: Compose, given: Sequence[str]) -> list[Setting]:
        found: list[Setting] = []
        for entry in _entries(self.path):
            source = f"{self.path}:{entry.line}"
            try:
                found += self._understood(entry, source)
            except ValueError as error:
                self.faults.append(f"{source}: {error}")
        own = {one.partition("=")[0] for one in given}
        choices = [one for one in found if self._is_group(one.name)]
        made = [one.argument for one in choices if one.name not in own and not one.is_implied]
        # What is implied gives way, and Hydra takes no choice twice.
        taken = {*own, *(one.partition("=")[0] for one in made)}
        made += [one.argument for one in choices if one.is_implied and one.name not in taken]
        made = [*dict.fromkeys(made), *given]
        config = self._composed(compose, made, choices)
        values = [self._looked_up(one, config, made) for one in found if one not in choices]
        self.faults += set_twice([*choices, *values])
        if self.faults:
            raise ValueError("\n".join(sorted(dict.fromkeys(self.faults), key=self._line)))
        return [*choices, *values]

    def _line(self, fault: str) -> int:
        return int(fault.removeprefix(f"{self.path}:").partition(":")[0])

    def _understood(self, entry: _Entry, source: str) -> list[Setting]:
        """Return an entry as choices, or as values whose names nobody has looked up yet."""
        if reason := _why_not(entry):
            raise ValueError(f"{entry.name}: {reason}")
        if entry.name in BY_NAME and not isinstance(entry.value, Mapping):
            if entry.value is None and not self._is_own(entry.name):
                return []  # in axolotl's files, names without a value are common
            if found := translated(entry.name, self._value(entry)):
                return [
                    *(Setting(one, source) for one in found.settings),
                    *(Setting(one, source, is_implied=True) for one in found.brings),
                ]
        group = entry.plain.replace(".", "/")
        is_group = self._is_group(group)
        if entry.sign == "~" and entry.value is None:
            return [Setting(f"~{group if is_group else entry.plain}", source)]
        if is_group and isinstance(entry.value, str | list):
            choice = f"{group}={self._value(entry)}"
            return [Setting(with_default_callbacks(choice, config_dir=self.config_dir), source)]
        if is_group and "/" not in group and not isinstance(entry.value, Mapping):
            if entry.value is None:
                raise ValueError(null_choices([f"{group}=null"], config_dir=self.config_dir))
            near = choices_near(group, str(entry.value), config_dir=self.config_dir)
            raise ValueError(f"{group}={entry.value}: this is no choice. {near}")
        return [Setting(f"{entry.name}={in_grammar(entry.value)}", source)]

    def _is_own(self, name: str) -> bool:
        return BY_NAME[name].here.startswith(f"{name}=")

    def _value(self, entry: _Entry) -> str:
        """Return a value in Hydra's grammar; the names of choices without quotes."""
        if not self._is_group(entry.plain.replace(".", "/")):
            return in_grammar(entry.value)
        names = entry.value if isinstance(entry.value, list) else [entry.value]
        for name in names:
            if not _CHOICE.fullmatch(str(name)):  # such as `a,b`, which would be a sweep
                raise ValueError(f"{entry.name}: {str(name)!r} is no name of a choice.")
        return f"[{','.join(map(str, names))}]" if isinstance(entry.value, list) else str(names[0])

    def _is_group(self, name: str) -> bool:
        return bool(name) and (self.config_dir / name).is_dir()

    def _composed(self, compose: Compose, made: Sequence[str], choices: Sequence[Setting]) -> Any:
        """Return the configuration that the choices give; None if they cannot be made."""
        try:
            return OmegaConf.to_container(compose(made), resolve=False)
        except (HydraException, OmegaConfBaseException, yaml.YAMLError, RecursionError):
            for one in choices:
                group, _, name = one.argument.partition("=")
                near = choices_near(group, name, config_dir=self.config_dir)
                if one.argument in made and near:
                    self.faults.append(f"{one.source}: {one.argument}: this is no choice. {near}")
            return None  # or the command line is at fault, and Hydra will say so

    def _looked_up(self, one: Setting, config: Any, made: Sequence[str]) -> Setting:
        """Return a value with a plus if Hydra needs one, since the name is not there yet."""
        name, _, value = one.argument.partition("=")
        if config is None or name.startswith("~"):
            return one
        is_there = _is_there(one.name, config)
        if not is_there and not name.startswith("+") and not _is_open(one.name, config):
            near = names_near([*made, one.argument], config_dir=self.config_dir).strip()
            self.faults.append(f"{one.source}: {near or f'there is no {one.name}.'}")
        adds = not is_there or (name.startswith("+") and value.startswith(("{", "[")))
        return replace(one, argument=f"{'+' * adds}{one.name}={value}")


def _why_not(entry: _Entry) -> str:
    """Return why a file may not hold a setting; empty if it may."""
    if not _NAME.fullmatch(entry.name):
        return "this is no name of a setting."
    if re.split(r"[./]", entry.plain)[0] == "hydra":
        return "only the command line may change Hydra's own settings."
    if entry.plain == "hparams_search":
        return "only the command line may start a sweep."
    is_off = entry.name.rpartition(".")[2] in TRUST and entry.value in (None, False, [])
    if not is_off and gives_trust(f"{entry.name}={in_grammar(entry.value)}"):
        return "only the command line may give trust."
    return ""


def _is_there(name: str, config: Any) -> bool:
    node: Any = config
    for part in name.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return False
        node = node[part]
    return True


def _is_open(name: str, config: Any) -> bool:
    """Whether a setting belongs into a mapping that is empty, such as `data.source_options`."""
    node: Any = config
    for part in name.split("."):
        if not isinstance(node, Mapping) or part not in node:
            break
        node = node[part]
    return isinstance(node, Mapping) and not node


def _entries(path: Path) -> Iterator[_Entry]:
    """Yield the names of a file with their values.

    Raises:
        ValueError: If the file cannot be read, or is no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            raise ValueError(f"{path}: the file holds no settings.")
        if not isinstance(root, yaml.MappingNode):
            raise ValueError(f"{path}: the file is no mapping, such as `optim.lr: 1e-4`.")
        lines = dict(_lines(root, path))
        values: Any = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: this is no text in UTF-8.") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ValueError(f"{where}: {error.problem}.") from error
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        first = str(error).partition("\n")[0]
        raise ValueError(f"{path}: {first}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: the file is nested too deeply.") from error
    yield from _flat(values, "", lines, 1)


def _lines(node: yaml.MappingNode, path: Path, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yield each name with its line. Raise ValueError if a name stands twice."""
    own: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
            if key.value == "<<":
                continue
            raise ValueError(f"{path}:{line}: a name must be a text.")
        if key.value in own:
            first = own[key.value]
            raise ValueError(f"{path}:{line}: {key.value} stands in line {first} already.")
        own[key.value] = line
        name = _joined(prefix, key.value)
        yield name, line
        if isinstance(value, yaml.MappingNode):
            yield from _lines(value, path, name)


def _joined(prefix: str, name: str) -> str:
    """Return the whole name, with its plus or tilde in front."""
    sign = name[0] if prefix and name.startswith(("+", "~")) else ""
    return f"{sign}{prefix}.{name.removeprefix(sign)}".lstrip(".")


def _flat(
    node: Mapping[str, Any], prefix: str, lines: Mapping[str, int], line: int
) -> Iterator[_Entry]:
    """Yield what is not a mapping itself, an empty one, or one that is added."""
    for key, value in node.items():
        name = _joined(prefix, str(key))
        own = lines.get(name, line)
        if isinstance(value, Mapping) and value and not name.startswith(("+", "~")):
            yield from _flat(value, name, lines, own)
        else:
            yield _Entry(name, value, own)
