"""The arguments of what a configuration names: from the signatures of classes and functions."""

from __future__ import annotations

import builtins
import inspect
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass
from functools import cache
from inspect import Parameter
from typing import Any, get_args, get_origin

from hydra.utils import get_object

from lit_ft.run.library_ranges import IGNORE_OTHERS, range_of
from lit_ft.run.types import Allowed, allowed


@dataclass(frozen=True)
class Constructor:
    """What a class or function takes.

    Args:
        arguments: What each argument admits, by name.
        required: The arguments without a default.
        is_open: Whether it takes names that are not among the arguments.
    """

    arguments: Mapping[str, Allowed] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    is_open: bool = True


@cache
def constructor_named(target: str) -> Constructor:
    """Return what the class or function of this name takes; anything if it cannot be read.

    Args:
        target: The full name, of a package that the user trusts: the package is imported.
    """
    try:
        return constructor_of(get_object(target))
    except (ImportError, ValueError, TypeError):  # Hydra itself says what it cannot find or call
        return Constructor()


@cache
def constructor_of(made: Any) -> Constructor:
    """Return what a class or function takes.

    If it passes keyword arguments on to the constructor of its base class, it takes that one's
    arguments too. Of other packages, it may take more names than can be seen.

    Args:
        made: The class or function.
    """
    found: dict[str, Allowed] = {}
    required = []
    is_open = False
    for function in _called(made):
        parameters = list(inspect.signature(function).parameters.values())
        hints = _hints(function, made)
        is_open = False
        for parameter in parameters[1:] if isinstance(made, type) else parameters:
            annotation = hints.get(parameter.name, Parameter.empty)
            if parameter.kind is Parameter.VAR_KEYWORD:
                named = _unpacked(annotation)
                is_open = named is None and made.__module__ not in IGNORE_OTHERS
                found |= {name: allowed(one) for name, one in (named or {}).items()}
            elif parameter.kind is not Parameter.VAR_POSITIONAL and parameter.name not in found:
                limit = range_of(made, parameter.name)
                found[parameter.name] = allowed(annotation, default=parameter.default, limit=limit)
                if parameter.default is Parameter.empty:
                    required.append(parameter.name)
        if not is_open:
            break
    return Constructor(found, tuple(required), is_open)


def _called(made: Any) -> Iterator[Callable[..., Any]]:
    """Yield the function that is called, and those of base classes that it may pass options to."""
    if not isinstance(made, type):
        yield made
        return
    for kind in made.__mro__:
        if "__init__" in vars(kind) and kind is not object:
            yield vars(kind)["__init__"]
            if not made.__module__.startswith("lit_ft."):
                return


def _unpacked(annotation: Any) -> dict[str, Any] | None:
    """Return the names and types of `**options: Unpack[...]`; None if it is something else."""
    if get_origin(annotation) is not typing.Unpack:
        return None
    [options] = get_args(annotation)
    return typing.get_type_hints(options, include_extras=True)


def _hints(function: Callable[..., Any], made: Any) -> dict[str, Any]:
    """Return the annotations by name; a name that only a type checker can import is `Any`."""
    is_fields = is_dataclass(made) and function is vars(made).get("__init__")
    home: Any = made if is_fields else inspect.unwrap(function)
    modules = {kind.__module__ for kind in (made.__mro__ if is_fields else [home])}
    known = {name for module in modules for name in vars(sys.modules[module])}
    names = _AnyIfUnknown(known | set(vars(builtins)))
    return typing.get_type_hints(home, localns=names, include_extras=True)


class _AnyIfUnknown(dict[str, Any]):
    def __init__(self, known: set[str]) -> None:
        super().__init__()
        self._known = known

    def __missing__(self, name: str) -> Any:
        if name in self._known:
            raise KeyError(name)  # which Python then takes from the module
        return Any
