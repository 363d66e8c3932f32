"""What a parameter admits from a configuration: its annotation as a strict pydantic type.

A configuration holds plain values, lists and mappings, and nodes with `_target_` that become
objects. A number is not text here, true is not 1, 2.0 is not a whole number, and NaN is no number.
"""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from inspect import Parameter
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from annotated_types import BaseMetadata, GroupedMetadata
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

_STRICT = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
_TRUTHS = ("true", "false", "yes", "no", "on", "off", "y", "n")  # of YAML 1.1, not of Hydra


class Made:
    """Stands for a node with `_target_`, which becomes an object."""


@dataclass(frozen=True)
class Allowed:
    """The values that a parameter admits.

    Args:
        type: The type of the values, in pydantic's terms.
    """

    type: Any = field(hash=False)

    @cached_property
    def _adapter(self) -> TypeAdapter[Any]:
        return TypeAdapter(self.type, config=_STRICT)

    @cached_property
    def text(self) -> str:
        """What is allowed, in words."""
        return _text(self.type)

    def admits(self, value: Any) -> bool:
        """Whether the parameter can be set to `value`, a value of a resolved configuration."""
        try:
            self._adapter.validate_python(_with_stand_ins(value))
        except ValidationError:
            return False
        return True

    def hint(self, value: Any) -> str:
        """Return what to write for the value that was probably meant; empty if none is near."""
        if isinstance(value, float) and value.is_integer() and self.admits(int(value)):
            return f"Write {int(value)}."
        if not isinstance(value, str):
            return ""
        if any(self.admits(meant) for meant in _unquoted(value)):
            return f"Write {value} without quotes."
        if self.admits([value]):
            return f"Write [{value}]."
        return f"'{value}' is text." if value.lower() in _TRUTHS and self.admits(True) else ""


def _unquoted(text: str) -> Iterator[Any]:
    """Yield what a text would be without quotes around it."""
    if text in ("true", "false"):
        yield text == "true"
    for kind in (int, float):
        with suppress(ValueError):
            yield kind(text)


def allowed(annotation: Any, *, default: Any = Parameter.empty, limit: Any = None) -> Allowed:
    """Return what a parameter admits.

    A parameter without an annotation admits what is of its default's kind, and anything if the
    default is None, text or missing.

    Args:
        annotation: The parameter's annotation, or `Parameter.empty`.
        default: The parameter's default, or `Parameter.empty`.
        limit: A range of `annotated_types` for the parameter's numbers; or an annotation that
            takes the place of the parameter's own.
    """
    bounds: tuple[Any, ...] = ()
    if isinstance(limit, BaseMetadata | GroupedMetadata):
        bounds = (limit,)
    elif limit is not None:
        annotation = limit
    if annotation in (Parameter.empty, Any):
        annotation = _kind_of(default, numeric=bool(bounds))
    kind = _strict(annotation, bounds)
    return Allowed(Union[kind, None] if default is None else kind)  # noqa: UP007  # of variables


def _kind_of(default: Any, *, numeric: bool) -> Any:
    if isinstance(default, bool):
        return bool
    if isinstance(default, int | float):
        return float
    if isinstance(default, tuple) and default:
        return tuple[tuple(_kind_of(one, numeric=numeric) for one in default)]  # type: ignore[misc]
    return float if numeric else Any


def _strict(annotation: Any, bounds: tuple[Any, ...]) -> Any:
    """Return an annotation with objects as `Made`, sequences as lists, and bounds on numbers."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner, *metadata = args
        if inner in (int, float):
            return _strict(inner, (*bounds, *metadata))
        return Annotated[(_strict(inner, bounds), *metadata)]
    if annotation in (int, float):
        return Annotated[(annotation, *bounds)] if bounds else annotation
    if annotation in (bool, str, Any):
        return annotation
    if origin is Literal:
        return Annotated[annotation, BeforeValidator(_of_a_type_in(args))]
    if annotation is None or annotation is type(None):
        return None
    if origin in (Union, types.UnionType):
        return Union[tuple(_strict(one, bounds) for one in args)]  # noqa: UP007
    if isinstance(annotation, TypeVar):
        return Any
    kind = origin or annotation
    if isinstance(kind, type) and issubclass(kind, os.PathLike):
        return str
    if typing.is_typeddict(kind):
        return dict[str, Any]
    return _container(kind, args, bounds)


def _of_a_type_in(choices: tuple[Any, ...]) -> Callable[[Any], Any]:
    """Return a function that refuses true where 1 is a choice, which Python finds equal."""
    types_of = {type(choice) for choice in choices}

    def checked(value: Any) -> Any:
        if type(value) not in types_of:
            raise ValueError("of no choice's type")
        return value

    return checked


def _container(kind: Any, args: tuple[Any, ...], bounds: tuple[Any, ...]) -> Any:
    inner = tuple(one if one is ... else _strict(one, bounds) for one in args)
    if not isinstance(kind, type):
        return Any
    if issubclass(kind, tuple) and inner and inner[-1] is not ...:
        return Annotated[tuple[inner], Field(strict=False)]  # type: ignore[valid-type]
    if issubclass(kind, Mapping):
        return dict[inner or (str, Any)]  # type: ignore[misc]
    if issubclass(kind, Iterable) and kind.__module__ in ("builtins", "collections.abc", "typing"):
        return list[inner[0] if inner else Any]  # type: ignore[misc]
    return Made


def _with_stand_ins(value: Any) -> Any:
    if isinstance(value, Mapping):
        if "_target_" in value:
            return Made()
        return {key: _with_stand_ins(one) for key, one in value.items()}
    return [_with_stand_ins(one) for one in value] if isinstance(value, list) else value


def _phrases(kind: Any) -> list[str]:
    """Return the alternatives that a type admits, each in words."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Union:
        return [phrase for one in _worth_naming(args) for phrase in _phrases(one)]
    if origin is Literal:
        return [as_typed(one) for one in args]
    if origin is Annotated:
        described = [one.description for one in args[1:] if getattr(one, "description", None)]
        words = _in_words(args[1:])
        return described or [phrase + words for phrase in _phrases(args[0])]
    if origin is tuple:
        each = _either(dict.fromkeys(map(_text, args)))
        return [f"a list of {len(args)}, each {each}"]
    if origin is list:
        return ["a list" if args[0] is Any else f"a list, each {_text(args[0])}"]
    if origin is dict:
        return ["a mapping of names to values"]
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    names |= {type(None): "null", Made: "a class (`_target_`)"}
    return [names.get(kind, "null" if kind is None else "any value")]


def _text(kind: Any) -> str:
    return _either(dict.fromkeys(_phrases(kind)))


def _worth_naming(kinds: tuple[Any, ...]) -> list[Any]:
    """Leave out whole numbers where any number is allowed, and objects next to plain values."""
    numbers = [kind for kind in kinds if kind is float or get_args(kind)[:1] == (float,)]
    subsumed = [
        Annotated[(int, *get_args(kind)[1:])] if kind is not float else int for kind in numbers
    ]
    named = [kind for kind in kinds if kind not in subsumed and kind is not Made]
    return named if any(kind not in (None, type(None)) for kind in named) else list(kinds)


def _in_words(metadata: Iterable[Any]) -> str:
    words = [
        f"{phrase} {as_typed(getattr(bound, name))}"
        for group in metadata
        for bound in (group if isinstance(group, GroupedMetadata) else [group])
        for name, phrase in _BOUNDS.items()
        if hasattr(bound, name)
    ]
    of = " of" if words and words[0].startswith("at") else ""
    return f"{of} {' and '.join(words)}" if words else ""


def _either(phrases: Iterable[str]) -> str:
    *first, last = sorted(phrases, key=lambda phrase: phrase == "null")
    return f"{', '.join(first)} or {last}" if first else last


def as_typed(value: Any) -> str:
    """Return a value as the command line writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {as_typed(one)}' for key, one in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(as_typed, value))}]"
    return str(value)
