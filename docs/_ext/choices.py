"""The page of choices and values, from the YAML files of conf/ and their comments.

python docs/_ext/choices.py    # prints it
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from lit_ft.run.settings import settings_of

CONF = Path(__file__).parents[2] / "conf"
_HIDDEN = ("hydra.help.",)  # the text of --help
_COMMENT = re.compile(r"(?:^|\s)#(.*)$")
_SETTING = re.compile(r"(?<![\w`'/.])[+~]?[A-Za-z_][\w./@]*=(?:\[[^\]\s]*\]|[\w./@+-]*[\w/])")


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
        if self.group == "callbacks" and self.name not in ("default", "none"):
            return f"'callbacks=[default,{self.name}]'"
        return f"{self.group}={self.name}"


def read(path: Path, conf: Path = CONF) -> Choice:
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
    return yaml.safe_dump(plain, default_flow_style=True, width=10**6, sort_keys=False).strip()


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


def groups(conf: Path = CONF) -> dict[str, list[Choice]]:
    """Return the choices of each group: in train.yaml's order, then the others by name."""
    found: dict[str, list[Choice]] = {}
    for path in sorted(conf.glob("**/*.yaml")):
        if path.parent != conf and path.relative_to(conf).parts[0] != "local":  # one's own
            choice = read(path, conf)
            found.setdefault(choice.group, []).append(choice)
    first = list(defaults_of_the_job(conf))
    return {group: found[group] for group in sorted(found, key=lambda g: (_place(g, first), g))}


def _place(group: str, order: list[str]) -> int:
    root = group.split("/")[0]
    return order.index(root) if root in order else len(order)


def defaults_of_the_job(conf: Path = CONF) -> dict[str, str]:
    """Return what `python train.py` chooses where nothing is typed, by group."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf), version_base="1.3"):
        job = compose("train", return_hydra_config=True)
    choices = dict(job.hydra.runtime.choices)
    order = [
        next(iter(e))
        for e in yaml.safe_load((conf / "train.yaml").read_text())["defaults"]
        if isinstance(e, dict)
    ]
    groups = [group.removeprefix("override ").removeprefix("optional ") for group in order]
    named = {group: choices.get(group) for group in [*groups, *choices] if "hydra" not in group}
    return {group: str(name) for group, name in named.items() if name is not None}


def render(conf: Path = CONF) -> str:
    """Return the page's generated part, in Markdown."""
    found, chosen = groups(conf), defaults_of_the_job(conf)
    lines = ["## The groups", "", "| Group | Without being set | Choices |", "| --- | --- | --- |"]
    for group, choices in found.items():
        default = chosen.get(group)
        names = ", ".join(_link(choice) for choice in choices)
        lines.append(f"| `{group}` | {f'`{default}`' if default else ''} | {names} |")
    job = read(conf / "train.yaml", conf)
    lines += ["", "## Values of the job itself", "", *_table(job.values, _allowed(conf))]
    for group, choices in found.items():
        lines += ["", f"## `{group}`"]
        for choice in choices:
            lines += [
                "",
                f"({_target(choice)})=",
                f"### `{choice.typed}`",
                "",
                *_about(choice, conf),
            ]
    return "\n".join(lines) + "\n"


def _target(choice: Choice) -> str:
    return f"choice-{choice.group}-{choice.name}".replace("/", "-").replace("_", "-")


def _link(choice: Choice) -> str:
    return f"[`{choice.name}`](#{_target(choice)})"


def _about(choice: Choice, conf: Path) -> Iterator[str]:
    yield from _prose(choice.comment)
    if choice.base:
        starts = ", ".join(f"`{choice.group}={name}`" for name in choice.base)
        yield from ("", f"Starts from {starts}; the values below differ or come on top.")
    if choice.brings:
        yield from ("", f"Also chooses {', '.join(f'`{one}`' for one in choice.brings)}.")
    if choice.values:
        is_of_hydra = all(value.name.startswith("hydra.") for value in choice.values)
        typed = [] if is_of_hydra else [choice.typed.strip("'")]
        yield from ("", *_table(choice.values, _allowed(conf, *typed)))


def _prose(lines: tuple[str, ...]) -> Iterator[str]:
    """Yield a comment's lines as Markdown: commands as code, the rest as text."""
    in_code = False
    for line in lines:
        is_code = line.lstrip().startswith("python train.py") or (in_code and line.startswith("  "))
        if is_code != in_code:
            yield from (("", "```bash") if is_code else ("```", ""))
        in_code = is_code
        yield line.strip() if is_code else _escaped(line)
    if in_code:
        yield "```"


def _table(values: tuple[Value, ...], allowed: dict[str, str]) -> Iterator[str]:
    yield from ("| Value | Default | Allowed | What it is |", "| --- | --- | --- | --- |")
    for value in values:
        default = f"`{value.default}`".replace("|", r"\|") if value.default else ""
        kind = _escaped(allowed.get(value.name, ""))
        yield f"| `{value.name}` | {default} | {kind} | {_escaped(value.comment)} |"


def _allowed(conf: Path, *typed: str) -> dict[str, str]:
    """Return what each setting admits, with these choices: from what they name itself."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf), version_base="1.3"):
        job = compose("train", ["run_dir=runs", *typed])
    config: Any = OmegaConf.to_container(job, resolve=True)
    written: Any = OmegaConf.to_container(job, resolve=False)
    known = settings_of(config, written)
    return {one.name: one.allowed.text for one in known if one.allowed is not None}


def _escaped(text: str) -> str:
    """Return plain text as Markdown; settings and what stands in backticks become code."""
    parts = re.split(r"(`[^`]*`)", text)
    done = []
    for part in parts:
        if not part.startswith("`"):
            part = _SETTING.sub(lambda match: f"`{match[0]}`", part)
            inner = re.split(r"(`[^`]*`)", part)
            part = "".join(
                p if p.startswith("`") else re.sub(r"([\\*\[\]<>$]|\b_|_\b)", r"\\\1", p)
                for p in inner
            )
        done.append(part.replace("|", r"\|"))
    return "".join(done)


def setup(app: Any) -> dict[str, bool]:
    """Write the page's generated part before Sphinx reads the pages."""
    generated = Path(app.srcdir) / "_generated"
    generated.mkdir(exist_ok=True)
    (generated / "choices.md").write_text(render(), encoding="utf-8")
    return {"parallel_read_safe": True, "parallel_write_safe": True}


if __name__ == "__main__":
    print(render())
