"""Write the settings of a command as a file that `--config` reads.

The choices that the command makes come first, and then the values that differ from those that the
choices give. Each has the comment that the YAML files of conf/ have for it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lit_ft.run.conf_comments import comments_of_groups, comments_of_values
from lit_ft.run.config_file import Compose
from lit_ft.run.files import SETTINGS, SETTINGS_HEADER, is_settings_file
from lit_ft.run.hidden import OWN_REFERENCE, in_grammar
from lit_ft.run.hydra_trust import composer_of_job
from lit_ft.run.override import name_of
from lit_ft.run.own_arguments import OF_ONE_START
from lit_ft.run.redaction import redacted
from lit_ft.run.trust import gives_trust
from lit_ft.storage.atomic import write_text

_CHOICES = "# Choices. Those in comments are the defaults, or come with the choices that are made."
_VALUES = "# Values that differ from those of the choices."
_LEFT_OUT = "# Left out:"
_WIDTH = 100
_PLACES = "hydra.searchpath="
_MISSING = object()


@dataclass(frozen=True)
class _Value:
    """A value that differs; `sign` is a plus if it is added, and a tilde if it is taken away."""

    name: str
    value: Any
    sign: str = ""


def save_config(path: Path, composed: Sequence[Any], compose: Compose, *, conf: Path) -> None:
    """Write the settings of a command to a file.

    Args:
        path: The file. It is replaced only if it was written in this way too.
        composed: What Hydra composes from the command, see `lit_ft.run.hydra_trust.compositions`.
        compose: Composes a configuration from arguments with the options of the command.
        conf: The folder that holds train.yaml.

    Raises:
        ValueError: If the command is a sweep, or if the file is someone's own.
        OSError: If the file cannot be written.
    """
    if len(composed) != 1:
        raise ValueError("--save-config: a sweep has the settings of several runs. Leave out -m.")
    if path.exists() and not is_settings_file(path):
        raise ValueError(f"{path} exists, and --save-config has not written it. Choose another.")
    write_text(path, _text(composed[0], composed[0].hydra, compose, conf))


def settings_of_run(config: Any, *, conf: Path) -> str:
    """Return the text of the file for the job that Hydra is running.

    What one start does, such as `resume` and `overwrite`, is left out. A run does not fail for this
    file: the text is empty, with a warning, if the choices cannot be composed again.

    Args:
        config: The configuration of the job, with its interpolations.
        conf: The folder that holds train.yaml.
    """
    run = HydraConfig.get()
    composed = composer_of_job(run.job.config_name, config_dir=conf)
    try:
        return _text(config, run, composed, conf, left_out=OF_ONE_START)
    except (HydraException, OmegaConfBaseException) as error:
        logging.getLogger(__name__).warning("%s is not written: %s", SETTINGS, error)
        return ""


def _text(
    config: Any, hydra: Any, compose: Compose, conf: Path, *, left_out: Collection[str] = ()
) -> str:
    # Where Hydra finds further choices is not saved, but needed to find them here.
    places = [one for one in hydra.overrides.hydra if one.startswith(_PLACES)]

    def composed(arguments: Sequence[str]) -> Any:
        return compose([*places, *arguments])

    typed = _typed(hydra.overrides.task, conf)
    made, bases = _made(typed, dict(hydra.runtime.choices), composed, conf)
    chosen = {**bases[0][1], **made}
    comments = comments_of_values(chosen, conf)
    plain = _plain(config)
    kept: list[str] = []
    dropped: list[str] = []
    for one in _differences(plain, [base for base, _ in bases]):
        if one.name in left_out:
            continue
        if reason := _reason_to_leave_out(one, bases[0][0]):
            dropped.append(f"#   {one.name}: {reason}")
        else:
            kept += _lines_of_value(one, comments.get(one.name, ""))
    parts = [[SETTINGS_HEADER], [_CHOICES, *_lines_of_choices(chosen, made, conf)]]
    parts += [[_VALUES, *kept]] * bool(kept) + [[_LEFT_OUT, *dropped]] * bool(dropped)
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _typed(arguments: Sequence[str], conf: Path) -> dict[str, Any]:
    """Return the choices that the command makes, keyed by group; None if it leaves one out."""
    made: dict[str, Any] = {}
    for argument in arguments:
        group = name_of(argument)
        if (conf / group).is_dir() and group != "hparams_search":
            override = OverridesParser.create().parse_override(argument)
            made[group] = None if argument.startswith("~") else override.value()
    return made


def _made(
    typed: Mapping[str, Any], choices: Mapping[str, Any], compose: Compose, conf: Path
) -> tuple[dict[str, Any], list[tuple[Any, dict[str, Any]]]]:
    """Return the choices to write, and what they give: on this machine, and on another one.

    Settings of this machine, in conf/local, hold for the command too. So they are written.
    """
    made = dict(typed)
    while True:
        arguments = [
            f"{group}={_choice(name)}" if name else f"~{group}" for group, name in made.items()
        ]
        composed = [compose(arguments)]
        local = composed[0].hydra.runtime.choices.get("local")
        if (conf / "local" / f"{local}.yaml").is_file():
            composed.append(compose([*arguments, "~local"]))
        bases = [(_plain(one), _choices(one.hydra.runtime.choices)) for one in composed]
        others = {
            group: name
            for group, name in _choices(choices).items()
            if group not in made and any(given.get(group) != name for _, given in bases)
        }
        if not others:
            return made, bases
        made |= others


def _choices(choices: Mapping[str, Any]) -> dict[str, Any]:
    own = {group: name for group, name in choices.items() if not group.startswith("hydra/")}
    return {g: n for g, n in own.items() if n is not None and g not in ("local", "hparams_search")}


def _choice(name: Any) -> str:
    return f"[{','.join(name)}]" if isinstance(name, list) else str(name)


def _plain(config: Any) -> dict[str, Any]:
    names = [name for name in config if name != "hydra"]
    plain: Any = OmegaConf.to_container(OmegaConf.masked_copy(config, names), resolve=False)
    return dict(plain)


def _differences(node: Any, bases: Sequence[Any], path: str = "") -> Iterator[_Value]:
    """Yield the values that differ from those of any base."""
    for key, value in node.items():
        name = f"{path}.{key}".lstrip(".")
        others = [base.get(key, _MISSING) for base in bases]
        if all(repr(other) == repr(value) for other in others):
            continue
        if isinstance(value, dict) and all(isinstance(one, dict) and one for one in others):
            yield from _differences(value, others, name)
        else:
            is_new = any(
                one is _MISSING or (isinstance(value, dict) and not isinstance(one, dict))
                for one in others
            )
            yield _Value(name, value, "+" * is_new)
    for key in bases[0]:
        if key not in node:
            yield _Value(f"{path}.{key}".lstrip("."), None, "~")


def _reason_to_leave_out(one: _Value, base: Any) -> str:
    """Return why a value is not written; empty if it is."""
    if gives_trust(f"{one.name}={in_grammar(one.value)}"):
        return "only the command line may give trust"
    secret = OWN_REFERENCE.fullmatch(str(one.value))
    if secret and os.environ.get(secret[1]) == str(_at(one.name, base)):
        return "a secret of a configuration file"
    return ""


def _at(name: str, node: Any) -> Any:
    for part in name.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def _lines_of_choices(
    chosen: Mapping[str, Any], made: Mapping[str, Any], conf: Path
) -> Iterator[str]:
    comments = comments_of_groups(conf)
    for group in [*(g for g in comments if g in chosen), *(g for g in chosen if g not in comments)]:
        name = chosen[group]
        if name is None:
            line = f"~{group}:"
        else:
            shown = _choice(name).replace(",", ", ")
            line = f"{'' if group in made else '# '}{group}: {shown}"
        comment = comments.get(group, "")
        yield f"{line:<32} # {comment}" if comment else line


def _lines_of_value(one: _Value, comment: str) -> Iterator[str]:
    name = one.sign + one.name
    if one.sign == "~":
        yield f"{name}:"
        return
    value = redacted(one.value, one.name)
    if isinstance(value, list) and all(map(_fits_json, value)):
        text = f"{name}: {json.dumps(value, ensure_ascii=False)}"
    else:
        text = OmegaConf.to_yaml({name: value}).rstrip("\n")
    line = f"{text:<32} # {comment}"
    if comment and ("\n" in text or len(line) > _WIDTH):
        yield from textwrap.wrap(comment, _WIDTH, initial_indent="# ", subsequent_indent="# ")
        yield text
    else:
        yield line if comment else text


def _fits_json(value: Any) -> bool:
    """Whether YAML reads the value's JSON as what it is."""
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, bool | int | str)
