"""Hide secrets from Hydra: a reference to a variable of the environment stands in their place.

Hydra writes its arguments and the whole configuration to files, prints them in its errors, and
starts other processes with them. Where an argument or a configuration file holds a secret, Hydra
gets `${oc.env:LIT_FT_SECRET_NAME}`. The variable holds the secret, so the run uses the real value,
and so do the processes that it starts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep
from hydra.errors import HydraException

from lit_ft.run.redaction import MASK, OWN_VARIABLES, is_secret

OWN_REFERENCE = re.compile(rf"\$\{{oc\.env:({OWN_VARIABLES}\w+)\}}")
"""A reference to a variable that holds a secret of this command, and its name."""

_NAME = re.compile(r"\w+(?=\s*:)")  # in a text that may be a dict
_SPECIAL, _ESCAPED = re.compile(r"[\\()\[\]{}:=, \t]"), r"\\\g<0>"


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of a command line with references in place of their secrets.

    Args:
        arguments: The arguments as the user typed them.

    Raises:
        ValueError: If a secret was left out of what the user copied from a run's files.
    """
    return [_without_secret(argument) for argument in arguments]


def references(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings of configuration files that hold secrets, with references to these.

    Args:
        config: The composed configuration as plain values, with its interpolations as they are
            written.

    Raises:
        ValueError: If a secret was left out of what the user copied from a run's files.
    """
    found = {}
    for name, value in _values(config):
        _ensure_given(name, value)
        if is_secret(name, value):
            found[name] = _reference(name, value)
    return found


def with_secrets(node: Any, name: str) -> Any:
    """Return values that a run has recorded, with the secrets that the environment holds.

    Args:
        node: Plain values, such as the configuration in a run's summary.
        name: The names that lead to `node`, joined by dots.

    Raises:
        ValueError: If the environment does not hold a secret. The message names the variable.
    """
    if isinstance(node, Mapping):
        return {key: with_secrets(value, f"{name}.{key}") for key, value in node.items()}
    if isinstance(node, list):
        return [with_secrets(value, f"{name}.{index}") for index, value in enumerate(node)]
    if not isinstance(node, str) or MASK not in node:
        return node
    if (secret := os.environ.get(_variable(name))) is None:
        raise ValueError(
            f"{name} is a secret, which the run's files do not hold: set the variable "
            f"{_variable(name)} of the environment to it."
        )
    return secret


def _without_secret(argument: str) -> str:
    key, assigned, typed = argument.partition("=")
    if not assigned or argument.startswith("-"):
        return argument
    name = key.lstrip("+~")
    values = _values_of(argument, key)
    if values is None:  # Hydra would print it: to hide the value is all that matters
        _ensure_given(name, typed)
        names = (name, *(f"{name}.{inner}" for inner in _NAME.findall(typed)))
        is_hidden = any(is_secret(one, typed) for one in names)
        return f"{key}={_reference(name, typed)}" if is_hidden else argument
    several = len(values) > 1
    hidden = [
        _without_secrets(value, name, f"{name}.{turn}" if several else name)
        for turn, value in enumerate(values)
    ]
    if hidden == values:
        return argument
    if argument.startswith("~"):
        return key  # to delete a setting, Hydra needs only its name
    return f"{key}={','.join(map(in_grammar, hidden))}"


def _values_of(argument: str, key: str) -> list[Any] | None:
    """Return the values of a setting, several if it is swept; None if Hydra cannot read them."""
    parser = OverridesParser.create()
    try:
        override = parser.parse_override(argument)
        if not override.is_sweep_override():
            return [override.value()]
        if not isinstance(override.value(), list | ChoiceSweep):
            return []  # numbers, or names of files
        choices = override.sweep_string_iterator()
        return [parser.parse_override(f"{key}={choice}").value() for choice in choices]
    except HydraException:
        return None


def _without_secrets(node: Any, name: str, variable: str) -> Any:
    """Return a value with references in place of its secrets.

    Args:
        node: The value that Hydra has read.
        name: The full name of its setting.
        variable: The name by which its secret is kept, which differs for each choice of a sweep.
    """
    if isinstance(node, Mapping):
        return {
            key: _without_secrets(value, f"{name}.{key}", f"{variable}.{key}")
            for key, value in node.items()
        }
    if isinstance(node, list):
        return [
            _without_secrets(value, f"{name}.{index}", f"{variable}.{index}")
            for index, value in enumerate(node)
        ]
    _ensure_given(name, node)
    return _reference(variable, node) if is_secret(name, node) else node


def in_grammar(value: Any) -> str:
    """Return a value in Hydra's grammar."""
    if isinstance(value, Mapping):
        pairs = (f"{_SPECIAL.sub(_ESCAPED, str(key))}: {in_grammar(value[key])}" for key in value)
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(in_grammar, value))}]"
    if value is None:
        return "null"
    if not isinstance(value, str):
        return str(value).lower() if isinstance(value, bool) else str(value)
    return value if OWN_REFERENCE.fullmatch(value) else in_quotes(value)


def in_quotes(value: str) -> str:
    """Return a text as Hydra's grammar quotes it, where it is read as it is."""
    # To Hydra, a backslash is an ordinary character unless a quote follows.
    escaped = re.sub(r"(\\*)('|$)", lambda end: end[1] * 2 + "\\'" * bool(end[2]), value)
    return f"'{escaped}'"


def _reference(name: str, secret: Any) -> str:
    os.environ[_variable(name)] = str(secret)
    return f"${{oc.env:{_variable(name)}}}"


def _variable(name: str) -> str:
    return OWN_VARIABLES + re.sub(r"\W", "_", name.replace(".", "__")).upper()


def _ensure_given(name: str, value: Any) -> None:
    """Raise ValueError if a run's files are the source of a value, and do not hold its secret."""
    missing = [one for one in OWN_REFERENCE.findall(str(value)) if one not in os.environ]
    if value == MASK or missing:
        raise ValueError(
            f"{name}={value}: this stands for a secret in the files of a run, which do not hold "
            f"it. Give the secret again: {name}=SECRET, or {name}='${{oc.env:VARIABLE}}' to read "
            "it from a variable of the environment."
        )


def _values(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the full name and the value of each setting."""
    if isinstance(node, Mapping | list):
        pairs = node.items() if isinstance(node, Mapping) else enumerate(node)
        for key, value in pairs:
            yield from _values(value, f"{name}.{key}".lstrip("."))
    else:
        yield name, node
