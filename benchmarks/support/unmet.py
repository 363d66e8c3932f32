"""Print which requirements of lit_ft this Python does not meet; exit with 1 if there are any.

    python benchmarks/support/unmet.py

It runs where they may all be missing, and so it is a script that imports nothing of lit_ft.
"""

import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    from packaging.requirements import Requirement
except ImportError:
    print("not met: packaging, and what else is not known")
    sys.exit(1)

_PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def unmet() -> list[str]:
    """Return the requirements, torch left out, whose package is missing or has another version."""
    listed = tomllib.loads(_PROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    found = [one for one in map(Requirement, listed) if one.name != "torch"]
    return [str(one) for one in found if not _meets(one)]


def _meets(requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(version(requirement.name))
    except PackageNotFoundError:
        return False


if __name__ == "__main__":
    missing = unmet()
    print(f"not met: {', '.join(missing)}" if missing else "all requirements are met")
    sys.exit(bool(missing))
