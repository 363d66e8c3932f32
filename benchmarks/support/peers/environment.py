"""An environment for the packages that a peer needs and lit_ft does not."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path


class NotInstalled(Exception):
    """Raised where pip cannot install what a peer needs."""


def python_with(packages: Sequence[str], folder: Path) -> str:
    """Return a Python that has these packages and all of this one's; made once, in `folder`.

    The peer's packages come first on its path, so that this environment stays as it is, and their
    versions do not collide with lit_ft's.
    """
    if not packages:
        return sys.executable
    home = folder.resolve() / "+".join(packages)
    python, made = home / "bin" / "python", home / "made"
    if not made.is_file():
        # Without pip, whose setuptools would come ahead of this environment's newer one.
        make = [sys.executable, "-m", "venv", "--clear", "--without-pip", str(home)]
        subprocess.run(make, check=True)
        ours = sysconfig.get_path("purelib")
        [theirs] = home.glob("lib/python*/site-packages")
        line = f"import site; site.addsitedir({ours!r})\n"
        (theirs / "with_lit_ft.pth").write_text(line, encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "--python", str(python)]
        if subprocess.run([*pip, "install", "--quiet", *packages]).returncode:
            raise NotInstalled(f"pip has not installed {', '.join(packages)}")
        made.touch()
    return str(python)
