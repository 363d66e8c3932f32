"""Keep the current folder off Python's search path."""

from __future__ import annotations

import sys
from pathlib import Path


def leave_out_current_folder() -> None:
    """Take the current folder off the search path if this process is `python -m lit_ft.chat`.

    Python puts it first for `-m`. It may be a stranger's, such as a folder of models, and libraries
    look for packages that are not installed, which may then be modules in it. If lit_ft itself was
    found there, it stays.
    """
    # Until Python has found the module to run, the name of the program is "-m".
    if sys.argv[:1] != ["-m"] or sys.flags.safe_path or not sys.path:
        return
    if Path(sys.path[0]).resolve() != Path(__file__).resolve().parents[1]:
        del sys.path[0]
