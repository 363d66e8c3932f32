"""The API reference: a page for each public module, found by looking, and names that lead there.

Public are the modules of lit_ft's root, its packages with an `__all__`, and the modules whose
classes a configuration names. Moves inside the package need no edit here.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import pkgutil
import re
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import lit_ft

CONF = Path(lit_ft.__file__).parents[1] / "conf"
_COLON = "\ue000"
_TARGET = re.compile(r"_target_: (lit_ft\.[\w.]+)")


def public_modules() -> list[str]:
    """Return the names of the modules that have a page."""
    packages = ["lit_ft", *_packages(lit_ft)]
    homes = {getattr(lit_ft, name).__module__ for name in lit_ft.__all__}
    root = {
        info.name
        for info in pkgutil.iter_modules(lit_ft.__path__, "lit_ft.")
        if not info.ispkg and info.name not in homes and "._" not in info.name
    }
    shown = {f"{package}.{name}" for package in packages for name in _names(package)}
    named = set(_TARGET.findall("".join(p.read_text() for p in CONF.glob("**/*.yaml"))))
    configured = {name.rpartition(".")[0] for name in named - shown}
    return sorted({*packages, *root, *configured})


def public_objects(modules: list[str]) -> dict[str, str]:
    """Return where each object is documented, by the name of where it is defined and by that."""
    places: dict[str, str] = {}
    for module in sorted(modules, key=lambda name: name.count(".")):
        for name in _names(module):
            public = f"{module}.{name}"
            made = getattr(importlib.import_module(module), name)
            home = f"{getattr(made, '__module__', module)}.{getattr(made, '__qualname__', name)}"
            places.setdefault(home, public)
            places.setdefault(public, public)
    return places


def _packages(package: ModuleType) -> Iterator[str]:
    for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        if info.ispkg:
            inner = importlib.import_module(info.name)
            if hasattr(inner, "__all__"):
                yield info.name
            yield from _packages(inner)


def _names(module: str) -> list[str]:
    found = importlib.import_module(module)
    if hasattr(found, "__all__"):
        return list(found.__all__)
    return [
        name
        for name, made in vars(found).items()
        if not name.startswith("_")
        and getattr(made, "__module__", None) == module
        and getattr(made, "__doc__", None)
    ]


def write_pages(app: Sphinx) -> None:
    """Write the reference's pages before Sphinx reads any."""
    folder = Path(app.srcdir) / "api"
    folder.mkdir(exist_ok=True)
    modules = public_modules()
    app.lit_ft_objects = public_objects(modules)  # type: ignore[attr-defined]
    pages = {"index.md": _index(modules)}
    pages |= {f"{module}.md": _page(module) for module in modules}
    for old in folder.glob("*.md"):
        if old.name not in pages:
            old.unlink()
    for name, text in pages.items():
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def _index(modules: list[str]) -> str:
    rows = [f"| [`{m}`]({m}.md) | {_first_sentence(m)} |" for m in modules]
    toctree = "\n".join(["```{toctree}", ":hidden:", "", *modules, "```"])
    lines = [
        "# API reference",
        "",
        "Generated from the docstrings. What stands here keeps its name; what does not may move.",
        "",
        "| Module | |",
        "| --- | --- |",
        *rows,
        "",
        toctree,
    ]
    return "\n".join(lines) + "\n"


def _first_sentence(module: str) -> str:
    doc = inspect.getdoc(importlib.import_module(module)) or ""
    return doc.split("\n\n")[0].replace("\n", " ").replace("|", r"\|")


def _page(module: str) -> str:
    directive = f".. automodule:: {module}\n   :members:\n   :show-inheritance:"
    return f"# `{module}`\n\n```{{eval-rst}}\n{directive}\n```\n"


def clean(_: Sphinx, what: str, name: str, made: Any, options: Any, lines: list[str]) -> None:
    """Let bars in docstrings be bars: in RST `|G|` would ask for a substitution.

    And a colon in the first line of a property a colon: napoleon would take a type to be before it.
    """
    if what in ("property", "attribute", "data") and lines:
        lines[0] = lines[0].replace(":", _COLON)
    for number, line in enumerate(lines):
        parts = re.split(r"(`[^`]*`)", line)
        lines[number] = "".join(p if p.startswith("`") else p.replace("|", r"\|") for p in parts)


def restore_colons(
    _: Sphinx, what: str, name: str, made: Any, options: Any, lines: list[str]
) -> None:
    """Put back what `clean` has hidden from napoleon."""
    lines[:] = [line.replace(_COLON, ":") for line in lines]


def skip_hooks(_: Sphinx, what: str, name: str, made: Any, skip: bool, options: Any) -> bool | None:
    """Leave out the methods that a framework calls: those that override one of its own."""
    path = getattr(made, "__qualname__", "").split(".")
    if what != "class" or len(path) < 2:
        return None
    owner = getattr(inspect.getmodule(made), path[-2], None)
    bases = owner.__mro__[1:] if isinstance(owner, type) else ()
    return any(hasattr(b, name) for b in bases if not b.__module__.startswith("lit_ft")) or None


def lead_to_public_names(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, content: nodes.Element
) -> nodes.Element | None:
    """Resolve a reference by what it names: a link if that is public, plain text if it exists."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    public = app.lit_ft_objects.get(target)  # type: ignore[attr-defined]
    if public is not None:
        found = _link(app, env, node["refdoc"], public, content)
        if found is not None:
            return found
    return content if _exists(target.partition("[")[0]) else None


def link_literals(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Turn the names of public objects that a page has in backticks into links."""
    objects: dict[str, str] = app.lit_ft_objects  # type: ignore[attr-defined]
    by_class = {p.rpartition(".")[2]: p for p in objects.values()}
    for literal in list(doctree.findall(nodes.literal)):
        text = literal.astext()
        if isinstance(literal.parent, nodes.title | nodes.reference | addnodes.desc_name):
            continue
        name = objects.get(text) or (by_class.get(text) if text[:1].isupper() else None)
        if name is not None:
            link = _link(app, app.env, docname, name, literal.deepcopy())
            if link is not None:
                literal.replace_self(link)


def _link(
    app: Sphinx, env: BuildEnvironment, docname: str, public: str, content: nodes.Element
) -> nodes.Element | None:
    node = addnodes.pending_xref("", refdomain="py", refspecific=False)
    domain = env.domains["py"]
    return domain.resolve_xref(env, docname, app.builder, "obj", public, node, content)


def _exists(target: str) -> bool:
    """Whether a name means something: to Python, to a module of lit_ft, or as a path."""
    if any(hasattr(known, target) for known in (builtins, typing)) or target in _names_in_use():
        return True
    path, names = target, []
    while path:
        try:
            found: Any = importlib.import_module(path)
        except ImportError:
            path, _, name = path.rpartition(".")
            names.insert(0, name)
            continue
        for name in names:
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False


@cache
def _names_in_use() -> set[str]:
    """Return the names that lit_ft's modules import, for the type checker alone too, or define."""
    found: set[str] = set()
    for path in Path(lit_ft.__file__).parent.glob("**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                found |= {alias.asname or alias.name for alias in node.names}
            elif isinstance(node, ast.ClassDef):
                found.add(node.name)
    return found


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect all of it."""
    app.connect("builder-inited", write_pages, priority=100)
    app.connect("autodoc-process-docstring", clean, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", restore_colons, priority=600)  # after it
    app.connect("autodoc-skip-member", skip_hooks)
    app.connect("missing-reference", lead_to_public_names)
    app.connect("doctree-resolved", link_literals)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
