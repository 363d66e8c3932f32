"""The embedded data: Python's standard library, read from the running interpreter.

The prompt is a function or class without its docstring, and the answer is the docstring. No
third-party file is shipped or downloaded. Another Python version gives slightly different pairs.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import platform
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lit_ft.compat import remedies
from lit_ft.compat.refusal import Refusal, Remedy
from lit_ft.data.rows import SourceRow

SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "_bundled",
    "_vendor",
}
VALIDATION_SHARE = 0.1  # of the modules

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Pair:
    """A definition without its docstring, and the docstring.

    Args:
        module: The path of the source file relative to the library, with forward slashes.
        line: The line where the definition or its first decorator starts, counted from 1.
        kind: The kind of definition, "function" or "class".
        code: The dedented source as written, with comments and without the docstring. `pass`
            replaces a body of only a docstring, so that the code always parses.
        docstring: The docstring, dedented as `inspect.cleandoc` does.
    """

    module: str
    line: int
    kind: str
    code: str
    docstring: str


class Docstrings:
    """The pairs of the standard library as prompts and completions, in a fixed order.

    The modules are split by hash, and about a tenth of them are for validation. No source file is
    on both sides. A docstring that occurs more than once is dropped with all its copies.

    Args:
        kind: The kind of definition to use, "function" or "class"; None uses both.
        library: The folder of the library's sources; None uses the running interpreter's.

    Raises:
        ValueError: If `kind` is unknown, or if the folder holds no Python source. Some
            interpreters ship only compiled files.
    """

    name = "python-docstrings"

    def __init__(self, kind: str | None = None, *, library: Path | None = None) -> None:
        if kind not in (None, "function", "class"):
            raise ValueError(f"{self.name}: kind must be function or class, not {kind!r}")
        self.kind = kind
        self.library = Path(library or sysconfig.get_path("stdlib"))
        if not self.files:
            raise Refusal(
                f"{self.name}: this Python interpreter ships no source of its standard library in "
                f"{self.library}",
                remedies.OWN_DATA,
                Remedy("use another interpreter"),
            )

    @cached_property
    def files(self) -> list[Path]:
        """The modules to read, sorted by relative path."""
        found = []
        for folder, folders, names in os.walk(self.library):
            # What is skipped is not walked either: site-packages has tens of thousands of files.
            folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
            within = Path(folder).relative_to(self.library)
            found += [within / name for name in names if name.endswith(".py")]
        return sorted(found, key=Path.as_posix)

    def identity(self) -> dict[str, object]:
        """Return the kind, the Python version, and the modules' sizes and modification times."""
        stats = [(file.as_posix(), (self.library / file).stat()) for file in self.files]
        return {
            "source": type(self).__name__,
            "kind": self.kind,
            "python": platform.python_version(),
            "files": [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats],
        }

    def rows(self) -> Iterator[SourceRow]:
        """Yield `{prompt, completion}` rows, each marked for training or validation."""
        pairs = [pair for file in self.files for pair in read_pairs(self.library, file)]
        copies = Counter(pair.docstring for pair in pairs)
        for pair in pairs:
            if copies[pair.docstring] == 1 and self.kind in (None, pair.kind):
                yield SourceRow(
                    origin=f"{pair.module}:{pair.line}",
                    fields={"prompt": prompt(pair), "completion": pair.docstring},
                    held_out=in_validation(pair.module),
                )


def prompt(pair: Pair) -> str:
    """Return the instruction, followed by the code in a fence."""
    return f"Write the docstring of this Python {pair.kind}.\n\n```python\n{pair.code}\n```"


def in_validation(module: str) -> bool:
    """Whether a module is for validation, by a hash that is the same in every Python version."""
    digest = hashlib.sha256(module.encode()).digest()
    return int.from_bytes(digest[:8], "big") < VALIDATION_SHARE * 2**64


def read_pairs(library: Path, file: Path) -> list[Pair]:
    """Return the pairs of one module in line order; none if the module does not parse."""
    try:
        source = (library / file).read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as the library's own invalid escapes
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    lines = source.encode().split(b"\n")  # columns of the syntax tree count bytes
    nodes = [node for node in ast.walk(tree) if isinstance(node, Definition)]
    pairs = []
    for node in sorted(nodes, key=lambda node: (node.lineno, node.col_offset)):
        docstring = inspect.cleandoc(ast.get_docstring(node, clean=False) or "").strip()
        if docstring:
            line = min(one.lineno for one in [node, *node.decorator_list])
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            code = without_docstring(lines, node)
            pairs.append(Pair(file.as_posix(), line, kind, code, docstring))
    return pairs


def without_docstring(lines: list[bytes], node: Definition) -> str:
    """Return the dedented source of a documented definition, without its docstring.

    Args:
        lines: The lines of the module's source, from the first.
        node: The definition in the module, which has a docstring.
    """
    doc, *rest = node.body
    assert node.end_lineno is not None
    assert doc.end_lineno is not None and doc.end_col_offset is not None
    before = lines[doc.lineno - 1][: doc.col_offset]
    after = lines[doc.end_lineno - 1][doc.end_col_offset :].lstrip(b" \t")
    after = after.removeprefix(b";").lstrip()
    if not rest:
        after = b"pass" + (b"  " + after if after else b"")
    # Lines that held only the docstring are removed with it.
    kept = [before + after] if (before + after).strip() else []
    start = min(one.lineno for one in [node, *node.decorator_list])
    body = lines[start - 1 : doc.lineno - 1] + kept + lines[doc.end_lineno : node.end_lineno]
    margin = lines[node.lineno - 1][: node.col_offset]
    return b"\n".join(line.removeprefix(margin) for line in body).decode()
