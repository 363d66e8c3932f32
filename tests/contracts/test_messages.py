"""A library speaks Python: only what serves the command line names settings of the command line."""

import ast
import re
from pathlib import Path

import lit_ft

ROOT = Path(lit_ft.__file__).parent
SERVES_THE_COMMAND_LINE = (
    "run",
    "compat",
    "comparison",  # of settings of the command line
    "chat.py",
    "compare.py",
    "search.py",
    "export.py",
    "plan.py",
    "preview.py",
)
SETTING = re.compile(
    r"\b(optim|strategy|update|adapter|galore)="
    r"|(?<![.`\w])(trainer|data|module|model|optim|schedule|checkpoint)\.[a-z_]+(?![\w.(\[])"
)


def strings():
    for path in sorted(ROOT.rglob("*.py")):
        if path.relative_to(ROOT).parts[0] not in SERVES_THE_COMMAND_LINE:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", node.value


def test_no_string_of_the_library_names_a_setting():
    found = [(place, m[0]) for place, text in strings() for m in SETTING.finditer(text)]
    assert not found, "use a Remedy of lit_ft.compat.remedies, which knows both languages"


def test_the_rule_sees_what_it_is_about():
    for text in ("use update=whole", "set trainer.max_steps", "raise data.max_length=8"):
        assert SETTING.search(text)
    for text in ("`lit_ft.data.collate`", "trainer.fit(module)", "trainer.callback_metrics[name]"):
        assert not SETTING.search(text)


def test_checks_are_few():
    names = [
        node.name
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        and re.match(r"_?(refuse|check|require)(_|$)", node.name)
    ]
    assert len(names) < 20, sorted(names)
