"""A wheel works in an empty folder, without the repository."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
from lit_ft.run.arguments import CONF, composed
from lit_ft.run.recommend import measured_losses

assert 2 < measured_losses()["adamw"] < 3
composed(["model=llama_3_1_8b", "experiment=full_8bit"])
print(CONF)
"""


@pytest.mark.process
def test_what_is_built_brings_its_configuration_and_the_measured_table(tmp_path: Path) -> None:
    built, empty = tmp_path / "built", tmp_path / "empty"
    empty.mkdir()
    command = ["setup.py", "-q", "egg_info", "-e", str(tmp_path), "build_py", "-d", str(built)]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)

    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=empty,
        env={**os.environ, "PYTHONPATH": str(built)},
        check=True,
        capture_output=True,
        text=True,
    )

    conf = built / "lit_ft" / "conf"
    assert done.stdout.strip() == str(conf)
    assert (built / "lit_ft" / "evaluation" / "tasks" / "docstring_choice.yaml").is_file()
    assert [file.name for file in conf.glob("local/*.yaml")] == []
