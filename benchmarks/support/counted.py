"""The bytes that torch's CPU allocator has in use, counted by a library in front of malloc."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

_SOURCE = Path(__file__).with_name("count_allocations.c")


def compiled_counter(folder: Path) -> Path:
    """Compile the library into `folder`; processes with its path in LD_PRELOAD count."""
    counter = folder / "count_allocations.so"
    compiler = [os.environ.get("CC", "cc"), "-O2", "-shared", "-fPIC", "-o", str(counter)]
    subprocess.run([*compiler, str(_SOURCE), "-ldl"], check=True)
    return counter


def peak_and_restart() -> int:
    """Return the most bytes in use since the last call, and begin again with those in use now.

    Raises:
        AttributeError: If this process runs without the library.
    """
    function = ctypes.CDLL(None).lit_ft_peak_and_restart
    function.restype = ctypes.c_longlong
    return int(function())
