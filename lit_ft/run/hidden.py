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
from hydra.errors import HydraException

from lit_ft.run.redaction import MASK, OWN_VARIABLES, is_secret

_OWN = re.compile(rf"\$\{{oc\.env:({OWN_VARIABLES}\w+)\}}")


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
    values: list[Any] = [typed]
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException:  # Hydra would print it: to hide the value is all that matters
        pass
    else:
        swept = override.is_sweep_override()
        values = list(override.sweep_string_iterator()) if swept else [override.value()]
    if isinstance(values[0], Mapping | list):
        for inner, value in _values(values[0], name):
            _ensure_given(inner, value)
            if is_secret(inner, value):
                argument = argument.replace(str(value), _reference(inner, value))
        return argument
    for value in values:
        _ensure_given(name, value)
    if not any(is_secret(name, value) for value in values):
        return argument
    if argument.startswith("~"):
        return key  # to delete a setting, Hydra needs only its name
    numbered = [f"{name}.{turn}" for turn in range(len(values))] if len(values) > 1 else [name]
    return f"{key}={','.join(map(_reference, numbered, values))}"


def _reference(name: str, secret: Any) -> str:
    os.environ[_variable(name)] = str(secret)
    return f"${{oc.env:{_variable(name)}}}"


def _variable(name: str) -> str:
    return OWN_VARIABLES + re.sub(r"\W", "_", name.replace(".", "__")).upper()


def _ensure_given(name: str, value: Any) -> None:
    """Raise ValueError if a run's files are the source of a value, and do not hold its secret."""
    missing = [one for one in _OWN.findall(str(value)) if one not in os.environ]
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
