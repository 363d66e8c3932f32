"""The page of choices and values, from the YAML files of conf/ and their comments.

python docs/_ext/choices.py    # prints it
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from lit_ft.run.conf_comments import Choice, Value, read
from lit_ft.run.settings import settings_of

CONF = Path(__file__).parents[2] / "conf"
_SETTING = re.compile(r"(?<![\w`'/.])[+~]?[A-Za-z_][\w./@]*=(?:\[[^\]\s]*\]|[\w./@+-]*[\w/])")


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
        typed = [] if is_of_hydra else [choice.typed]
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
