"""The embedded data: Python's own standard library, read from the running interpreter.

A function or class without its docstring is the prompt, its docstring the answer. No file of others
is shipped or fetched; another Python version gives slightly other pairs.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
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
    """A definition without its docstring, and its docstring.

    Args:
        module: Path of the source file relative to the library, with forward slashes.
        line: Where the definition starts, decorators included; from 1.
        kind: function or class.
        code: Its dedented source as it was written, comments included. Where nothing but the
            docstring was the body, `pass` stands for it, so that the code always parses.
        docstring: The docstring, dedented as `inspect.cleandoc` does.
    """

    module: str
    line: int
    kind: str
    code: str
    docstring: str


class Docstrings:
    """The pairs of the standard library as prompts and completions, in a fixed order.

    The modules are split by hash, about a tenth of them for validation: no source file is on both
    sides. A docstring that occurs more than once is dropped with all its copies.

    Args:
        kind: Only the docstrings of each `function`, or of each `class`; None for both.
        library: Folder of the library's sources; the running interpreter's own if None.

    Raises:
        ValueError: If the kind is unknown, or the folder holds no Python source, as where an
            interpreter is shipped with compiled files alone.
    """

    name = "python-docstrings"

    def __init__(self, kind: str | None = None, *, library: Path | None = None) -> None:
        if kind not in (None, "function", "class"):
            raise ValueError(f"{self.name}: kind must be function or class, not {kind!r}")
        self.kind = kind
        self.library = library or Path(sysconfig.get_path("stdlib"))
        if not self.files:
            raise Refusal(
                f"{self.name}: this Python interpreter ships no source of its standard library in "
                f"{self.library}",
                remedies.OWN_DATA,
                Remedy("use another interpreter"),
            )

    @cached_property
    def files(self) -> list[Path]:
        """The modules that are read, in order of their relative paths."""
        found = (file.relative_to(self.library) for file in self.library.rglob("*.py"))
        kept = [file for file in found if not SKIPPED_FOLDERS.intersection(file.parts)]
        return sorted(kept, key=Path.as_posix)

    def identity(self) -> dict[str, object]:
        """What determines the rows: the interpreter and the sizes and times of its modules."""
        stats = [(file.as_posix(), (self.library / file).stat()) for file in self.files]
        return {
            "source": type(self).__name__,
            "kind": self.kind,
            "python": platform.python_version(),
            "files": [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats],
        }

    def rows(self) -> Iterator[SourceRow]:
        """Yield `{prompt, completion}` rows, each with its side of the split."""
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
    """Return the instruction and the code, fenced."""
    return f"Write the docstring of this Python {pair.kind}.\n\n```python\n{pair.code}\n```"


def in_validation(module: str) -> bool:
    """Whether a module's pairs are for validation: by a hash that no Python version changes."""
    digest = hashlib.sha256(module.encode()).digest()
    return int.from_bytes(digest[:8], "big") < VALIDATION_SHARE * 2**64


def read_pairs(library: Path, file: Path) -> list[Pair]:
    """Return the pairs of one module in the order of their lines; none if it does not parse."""
    try:
        source = (library / file).read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the library's own invalid escapes and the like
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
    """Return the dedented source of a definition that has a docstring, less the docstring.

    Args:
        lines: The module's source, one line an item, from its first line.
        node: The definition in that module.
    """
    doc, *rest = node.body
    assert node.end_lineno is not None
    assert doc.end_lineno is not None and doc.end_col_offset is not None
    before = lines[doc.lineno - 1][: doc.col_offset]
    after = lines[doc.end_lineno - 1][doc.end_col_offset :].lstrip(b" \t")
    after = after.removeprefix(b";").lstrip()
    if not rest:
        after = b"pass" + (b"  " + after if after else b"")
    # A docstring that has its lines to itself takes them along.
    kept = [before + after] if (before + after).strip() else []
    start = min(one.lineno for one in [node, *node.decorator_list])
    body = lines[start - 1 : doc.lineno - 1] + kept + lines[doc.end_lineno : node.end_lineno]
    margin = lines[node.lineno - 1][: node.col_offset]
    return b"\n".join(line.removeprefix(margin) for line in body).decode()
