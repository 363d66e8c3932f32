"""Put the configuration files and the measured table into the wheel, inside the package.

`python -m lit_ft.plan` and `python -m lit_ft.preview` read them. In a clone, and so after
`pip install -e .`, they read those of the clone.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

LOCAL = Path("conf", "local")  # git ignores what users keep there


def files() -> list[Path]:
    """Return the files, as paths from the top of the repository."""
    conf = sorted(Path("conf").rglob("*.yaml"))
    return [
        *(file for file in conf if LOCAL not in file.parents),
        Path("benchmarks", "results", "quality.jsonl"),
    ]


class BuildWithConf(build_py):
    """The build of the package, with files from outside of its folder."""

    def run(self) -> None:
        """Copy the files next to the modules."""
        super().run()
        if self.editable_mode:
            return
        for file in files():
            copy = Path(self.build_lib, "lit_ft", file)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


setup(cmdclass={"build_py": BuildWithConf})
