"""Each law that the docs state has a test that names it, and each such test a law."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
STATED = re.findall(r"^\(law-(\d)\)=", (ROOT / "docs/galore/laws.md").read_text(), re.MULTILINE)
FILES = sorted((ROOT / "tests" / "laws").glob("test_law_*.py"))


def test_the_nine_laws_are_those_that_tests_name():
    assert [str(number) for number in range(1, 10)] == STATED
    assert sorted({path.name.split("_")[2] for path in FILES}) == STATED


def test_each_file_says_its_law_first():
    for path in FILES:
        number = path.name.split("_")[2]
        assert re.search(rf"\blaw {number}\b", path.read_text().splitlines()[0], re.IGNORECASE), (
            path
        )
