"""The check of a whole configuration: every name, type and range, before anything loads."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_ft.run.config import refuse_without_class, suggestion
from lit_ft.run.sections import SECTIONS
from lit_ft.run.trust import refuse_untrusted, trusted_packages
from lit_ft.run.types import Allowed, as_typed

_REFERENCE = re.compile(r"\$\{(?:[\w.]+:)?(\.*\w[\w.]*)")
_ALIAS = re.compile(r"\$\{([A-Za-z_][\w.]*)\}")
_HYDRA = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")
_LONGEST = 100  # characters of a value in a message


@dataclass(frozen=True)
class Setting:
    """A setting of a configuration, and what is known about it.

    Args:
        name: The name that the user types.
        value: The value; None if the setting is missing.
        allowed: The values that are allowed; None if nothing has this name.
        near: The names that are known in its place.
        is_missing: Whether it is required, and is not there.
    """

    name: str
    value: Any
    allowed: Allowed | None = None
    near: Collection[str] = ()
    is_missing: bool = False

    @property
    def fault(self) -> str:
        """What is wrong, in a line; empty if nothing is."""
        if self.allowed is None:
            parent, _, own = self.name.rpartition(".")
            return suggestion(self.name, own, parent, list(self.near)).strip()
        if self.is_missing:
            return f"{self.name} is missing: it must be {self.allowed.text}."
        if self.allowed.admits(self.value):
            return ""
        hint = self.allowed.hint(self.value)
        shown = as_typed(self.value)
        shown = shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}..."
        return f"{self.name}={shown}: must be {self.allowed.text}. {hint}".rstrip()


def admit(
    config: Mapping[str, Any],
    written: Mapping[str, Any],
    arguments: Sequence[str],
    *,
    parts: Collection[str] | None = None,
) -> None:
    """Raise ValueError if a configuration has a name, a type or a value that nothing admits.

    Packages are imported to read what their classes take, but nothing is built or loaded.

    Args:
        config: The configuration as plain values, with its interpolations resolved.
        written: The same with its interpolations as they are written, such as `${optim}`. They
            tell which of its names the user types.
        arguments: The arguments of the command line, which alone can give trust.
        parts: The top-level names to look into; None looks into all.

    Raises:
        ValueError: With a line for each fault.
    """
    looked_into = config if parts is None else {name: config[name] for name in parts}
    refuse_untrusted(looked_into, also=trusted_packages(config, arguments))
    refuse_without_class(config)
    section = config.get("compare")
    if isinstance(section, Mapping) and section.get("methods"):
        raise ValueError(
            "compare.methods lists the methods of a comparison, and a run has one: "
            "`python -m lit_ft.compare` takes the same arguments, and trains all of them."
        )
    if (tasks := _tasks_that_nothing_scores(config)) and (parts is None or "eval" in parts):
        raise ValueError(
            f"eval.tasks={as_typed(tasks)}: this run has no callback that scores them. "
            "callbacks=default has it, as lm_eval."
        )
    told: dict[str, str] = {}
    for setting in settings_of(config, written, parts=parts):
        if setting.name not in told and setting.fault:
            told[setting.name] = setting.fault
    if told:
        raise ValueError("\n".join(told.values()))


def _tasks_that_nothing_scores(config: Mapping[str, Any]) -> Any:
    """Return `eval.tasks` if there are any, and no callback reads them; else None."""
    section = config.get("eval")
    tasks = section.get("tasks") if isinstance(section, Mapping) else None
    callbacks = (config.get("trainer") or {}).get("callbacks") or config.get("callbacks") or {}
    nodes = callbacks.values() if isinstance(callbacks, Mapping) else callbacks
    targets = (str(one.get("_target_")) for one in nodes if isinstance(one, Mapping))
    return None if any(one.endswith(".LMEval") for one in targets) else tasks


def settings_of(
    config: Mapping[str, Any], written: Mapping[str, Any], *, parts: Collection[str] | None = None
) -> Iterator[Setting]:
    """Yield the settings of a configuration, whose classes are trusted; see `admit`."""
    for section in SECTIONS:
        node = config.get(section) if section else config
        if isinstance(node, Mapping) and (parts is None or not section or section in parts):
            yield from _of_section(section, node, written)
    for name, node in config.items():
        if parts is None or name in parts:
            yield from _inside(node, written.get(name), name, written)
    if parts is None or "groups" in parts:
        yield from _of_group_options(config)


def _of_section(
    section: str, node: Mapping[str, Any], written: Mapping[str, Any]
) -> Iterator[Setting]:
    """Yield the settings of a node without a class; a name is known, or something reads it."""
    # Here, because reading signatures needs Hydra and torch, and names without them answer at once.
    from lit_ft.run.constructors import constructor_of

    constructor = constructor_of(SECTIONS[section])
    read = _names_read(written)
    for name, value in node.items():
        path = f"{section}.{name}".lstrip(".")
        if name in constructor.arguments:
            yield Setting(_typed(path, written), value, constructor.arguments[name])
        elif not _is_read(path, read):
            yield Setting(path, value, near=constructor.arguments)
    for name in constructor.required:
        if name not in node:
            path = f"{section}.{name}".lstrip(".")
            yield Setting(path, None, constructor.arguments[name], is_missing=True)


def _inside(node: Any, as_written: Any, path: str, written: Mapping[str, Any]) -> Iterator[Setting]:
    """Yield the settings of the objects in a node, unless it is another one's under its name."""
    if isinstance(as_written, str) or not isinstance(node, Mapping | list):
        return
    if isinstance(node, Mapping) and "_target_" in node:
        yield from _of_object(node, as_written, path, written)
    names = node.keys() if isinstance(node, Mapping) else range(len(node))
    for name in names:
        yield from _inside(node[name], as_written[name], f"{path}.{name}", written)


def _of_object(
    node: Mapping[str, Any], as_written: Mapping[str, Any], path: str, written: Mapping[str, Any]
) -> Iterator[Setting]:
    from lit_ft.run.constructors import constructor_named

    constructor = constructor_named(str(node["_target_"]))
    for name, value in node.items():
        if name in constructor.arguments:
            typed = _typed(f"{path}.{name}", written)
            yield Setting(typed, value, constructor.arguments[name])
        elif name not in _HYDRA and not constructor.is_open:
            yield Setting(f"{path}.{name}", value, near=constructor.arguments)
    if not node.get("_partial_") and "_args_" not in node:
        for name in constructor.required:
            if name not in node:
                allowed = constructor.arguments[name]
                yield Setting(f"{path}.{name}", None, allowed, is_missing=True)


def _of_group_options(config: Mapping[str, Any]) -> Iterator[Setting]:
    """Yield the options of parameter groups. The optimizer's arguments say what they admit."""
    from lit_ft.run.constructors import constructor_named

    optimizer, groups = config.get("optim"), config.get("groups")
    if not isinstance(optimizer, Mapping) or not isinstance(groups, list):
        return
    arguments = constructor_named(str(optimizer.get("_target_"))).arguments
    for index, rule in enumerate(groups):
        options = rule.get("options") if isinstance(rule, Mapping) else None
        for name, value in (options if isinstance(options, Mapping) else {}).items():
            if name in arguments:
                yield Setting(f"groups.{index}.options.{name}", value, arguments[name])


def _typed(path: str, written: Mapping[str, Any]) -> str:
    """Return the name that the user types for a setting that may stand for another one."""
    seen = {path}
    while True:
        alias = _ALIAS.fullmatch(str(_at(path, written)))
        if alias is None or alias[1] in seen:
            return path
        path = alias[1]
        seen.add(path)


def _at(path: str, node: Any) -> Any:
    for name in path.split("."):
        if isinstance(node, list) and name.isdigit() and int(name) < len(node):
            node = node[int(name)]
        elif isinstance(node, Mapping):
            node = node.get(name)
        else:
            return None
    return node


def _names_read(node: Any, path: tuple[str, ...] = ()) -> set[str]:
    """Return the names that interpolations read."""
    if isinstance(node, Mapping):
        pairs: Any = node.items()
    elif isinstance(node, list):
        pairs = enumerate(node)
    else:
        found = _REFERENCE.findall(node) if isinstance(node, str) else []
        return {_absolute(name, path) for name in found}
    return {name for key, inner in pairs for name in _names_read(inner, (*path, str(key)))}


def _absolute(name: str, path: tuple[str, ...]) -> str:
    own = name.lstrip(".")
    up = len(name) - len(own)  # a dot is this node, two are the one above
    return ".".join((*path[: len(path) - up], own)) if up else own


def _is_read(path: str, read: set[str]) -> bool:
    """Whether an interpolation reads a setting, a part of it, or the node that it is in."""
    return any(
        path == name or path.startswith(f"{name}.") or name.startswith(f"{path}.") for name in read
    )
