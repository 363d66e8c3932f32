"""The versions that pyproject.toml allows, against those that the tests run on."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from lit_ft.measure.environment import TESTED_TORCH

ROOT = Path(__file__).parents[2]

TESTED = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if "==" in line and not line.startswith("#")
)


def requirements(name: str) -> list[Requirement]:
    """Each place where pyproject.toml asks for the package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    return [found for found in map(Requirement, lines) if found.name == name]


@pytest.mark.parametrize("name", ["lightning", "transformers", "peft", "torchao"])
def test_the_next_minor_release_is_not_allowed_before_it_is_tested(name: str) -> None:
    major, minor, *_ = Version(TESTED[name]).release
    found = requirements(name)
    assert found
    for requirement in found:
        assert requirement.specifier.contains(TESTED[name])
        assert requirement.specifier.contains(f"{major}.{minor}.999")
        assert not requirement.specifier.contains(f"{major}.{minor + 1}.0")


def test_the_torch_that_a_run_compares_with_is_the_tested_one() -> None:
    assert Version(TESTED["torch"]).release[:2] == Version(TESTED_TORCH).release[:2]
