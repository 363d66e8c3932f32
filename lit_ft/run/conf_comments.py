"""Read what the YAML files of conf/ say: their values, and the comments on these."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_HIDDEN = ("hydra.help.",)  # the text of --help
_COMMENT = re.compile(r"(?:^|\s)#(.*)$")


@dataclass(frozen=True)
class Value:
    """One line of a YAML file: a name, what it is without being set, and the line's comment."""

    name: str
    default: str
    comment: str


@dataclass(frozen=True)
class Choice:
    """One YAML file."""

    group: str
    name: str
    comment: tuple[str, ...]  # lines
    base: tuple[str, ...]  # choices of the same group that it starts from
    brings: tuple[str, ...]  # choices of other groups
    values: tuple[Value, ...]

    @property
    def typed(self) -> str:
        """What follows `python train.py`."""
        return f"{self.group}={self.name}"


def read(path: Path, conf: Path) -> Choice:
    """Return what one file says."""
    text = path.read_text(encoding="utf-8")
    group = path.parent.relative_to(conf).as_posix()
    header, package = _header(text, group)
    root = yaml.compose(text)
    comments = _comments(text, after=len(header))
    values: list[Value] = []
    base: list[str] = []
    brings: list[str] = []
    if isinstance(root, yaml.MappingNode):
        for key, node in root.value:
            if key.value == "defaults":
                base, brings = _defaults(yaml.safe_load(text)["defaults"], group)
            else:
                values += _values(key, node, package, text, comments)
    listed = tuple(value for value in values if not value.name.startswith(_HIDDEN))
    shown = tuple(line for line in header if not line.startswith("@package"))
    return Choice(group, path.stem, shown, tuple(base), tuple(brings), listed)


def _header(text: str, group: str) -> tuple[list[str], str]:
    """Return the comment's lines that a file begins with, and the package of its values."""
    header = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        header.append(line.removeprefix("#").removeprefix(" "))
    package = "" if group == "." else group.replace("/", ".")
    for line in header:
        if line.startswith("@package"):
            package = line.split()[1].replace("_global_", "")
    return header, package


@dataclass(frozen=True)
class _Comment:
    column: int
    text: str
    fills_line: bool


def _comments(text: str, *, after: int) -> dict[int, _Comment]:
    """Return each comment by its line, from line `after` on."""
    found = {}
    for number, line in enumerate(text.splitlines()):
        unquoted = re.sub(r"'[^']*'|\"[^\"]*\"", lambda quoted: "x" * len(quoted[0]), line)
        match = _COMMENT.search(unquoted)
        if match and number >= after:
            column = match.start(1) - 1
            said = line[column + 1 :].strip()
            found[number] = _Comment(column, said, fills_line=not line[:column].strip())
    return found


def _values(
    key: yaml.Node,
    node: yaml.Node,
    prefix: str,
    text: str,
    comments: dict[int, _Comment],
) -> Iterator[Value]:
    """Yield the values under a key; each comment goes to the line that it is on, or is above."""
    name = f"{prefix}.{key.value}" if prefix else str(key.value)
    nested = isinstance(node, yaml.MappingNode) and not node.flow_style and node.value
    first = key.start_mark.line
    last = first if nested else max(first, node.end_mark.line - (node.end_mark.column == 0))
    if isinstance(node, yaml.ScalarNode):
        last = node.start_mark.line if node.style is None else last
    said = _above(first, key.start_mark.column, comments)
    said += [comments.pop(line).text for line in range(first, last + 1) if line in comments]
    while _fills(comments, last + 1) and comments[last + 1].column > key.start_mark.column + 2:
        last += 1  # the comment goes on below
        said.append(comments.pop(last).text)
    if not nested:
        yield Value(name, _default(node, text), " ".join(said))
        return
    if said:
        yield Value(name, "", " ".join(said))
    for inner_key, inner in node.value:
        yield from _values(inner_key, inner, name, text, comments)


def _above(line: int, column: int, comments: dict[int, _Comment]) -> list[str]:
    first = line
    while _fills(comments, first - 1) and comments[first - 1].column == column:
        first -= 1
    return [comments.pop(number).text for number in range(first, line)]


def _fills(comments: dict[int, _Comment], line: int) -> bool:
    return line in comments and comments[line].fills_line


def _default(node: yaml.Node, text: str) -> str:
    if isinstance(node, yaml.ScalarNode) or node.flow_style:
        return text[node.start_mark.index : node.end_mark.index].strip() or "null"
    plain = yaml.safe_load(yaml.serialize(node))
    dumped = yaml.safe_dump(plain, default_flow_style=True, width=10**6, sort_keys=False)
    return str(dumped).strip()


def _defaults(entries: list[Any], own: str) -> tuple[list[str], list[str]]:
    """Split a defaults list into what the file starts from and what it chooses elsewhere."""
    base, brings = [], []
    for entry in entries:
        if isinstance(entry, str):
            name, _, package = entry.partition("@")
            if name == "_self_":
                continue
            if package and package != own:
                brings.append(f"{package}={name}")
            else:
                base.append(name)
        else:
            [(group, name)] = entry.items()
            group = group.removeprefix("override ").removeprefix("/").partition("@")[0]
            if name is not None:
                brings.append(f"{group}={name}")
    return base, brings


def comments_of_groups(conf: Path) -> dict[str, str]:
    """Return the comment on each choice in the defaults list of train.yaml, keyed by group."""
    text = (conf / "train.yaml").read_text(encoding="utf-8")
    comments = _comments(text, after=0)
    root: Any = yaml.compose(text)
    [entries] = [node for key, node in root.value if key.value == "defaults"]
    said = {}
    for entry in entries.value:
        if isinstance(entry, yaml.MappingNode):
            [(key, _)] = entry.value
            found = comments.get(key.start_mark.line)
            said[key.value.removeprefix("optional ")] = found.text if found else ""
    return said


def comments_of_values(choices: Mapping[str, Any], conf: Path) -> dict[str, str]:
    """Return the comments on the values that choices have, keyed by name.

    Args:
        choices: The name that is chosen in each group, or a list of names.
        conf: The folder of the files.
    """
    said = {value.name: value.comment for value in read(conf / "train.yaml", conf).values}
    for group, chosen in choices.items():
        for name in chosen if isinstance(chosen, list) else [chosen]:
            said |= _comments_of_choice(group, str(name), conf)
    return said


def _comments_of_choice(group: str, name: str, conf: Path) -> dict[str, str]:
    path = conf / group / f"{name}.yaml"
    if not path.is_file():  # it is in another folder, or it is null
        return {}
    choice = read(path, conf)
    said: dict[str, str] = {}
    for base in choice.base:
        said |= _comments_of_choice(group, base, conf)
    return said | {value.name: value.comment for value in choice.values if value.comment}
