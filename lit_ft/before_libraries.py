"""What is set before libraries load: the search path, and how their threads wait."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def prepare_own_command() -> None:
    """Prepare for the libraries if this process is `python -m lit_ft.chat` or a command like it."""
    # Until Python has found the module to run, the name of the program is "-m".
    if sys.argv[:1] == ["-m"]:
        leave_out_current_folder()
        let_waiting_threads_sleep()


def leave_out_current_folder() -> None:
    """Take the current folder off the search path.

    Python puts it first for `-m`. It may be a stranger's, such as a folder of models, and libraries
    look for packages that are not installed, which may then be modules in it. If lit_ft itself was
    found there, it stays.
    """
    if sys.flags.safe_path or not sys.path:
        return
    if Path(sys.path[0]).resolve() != Path(__file__).resolve().parents[1]:
        del sys.path[0]


def let_waiting_threads_sleep() -> None:
    """Let threads on the CPU sleep while they wait for each other, unless the user has chosen.

    They would spin, and keep the core from the very thread that they wait for, if another process
    has the other core. A product of [150, 576] and [576, 1536] matrices then takes 15 ms of two
    threads instead of 4 ms. It costs about 10 µs for each operation. The library of the threads
    reads this once, when torch loads it.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
