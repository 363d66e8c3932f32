"""What test files share is in tests/support: none imports from another, and that holds no test."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FILES = sorted(str(path.relative_to(TESTS)) for path in TESTS.rglob("*.py"))


@pytest.mark.parametrize("file", FILES)
def test_no_file_imports_from_a_test_file(file):
    modules = []
    for node in ast.walk(ast.parse((TESTS / file).read_text())):
        if isinstance(node, ast.ImportFrom):
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
    ours = [module.split(".") for module in modules if module.split(".")[0] == "tests"]
    assert not [name for name in ours if name[1] != "support"]


def test_support_holds_no_test():
    for path in (TESTS / "support").rglob("*.py"):
        names = [getattr(node, "name", None) for node in ast.walk(ast.parse(path.read_text()))]
        assert not [name for name in names if name and name.startswith("test_")], path
