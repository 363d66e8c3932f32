"""End a run when the process that started it has gone, however that ended.

Nobody would read the result, and the next one to start may train the same run in the same folder.
The starter holds the other end of this process's standard input, which the system closes.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from threading import Thread

_VARIABLE = "LIT_FT_SUPERVISED"


def environment_of_supervised() -> Mapping[str, str]:
    """Return the variable with which `python train.py` ends with its standard input."""
    return {_VARIABLE: "stdin"}


def end_with_starter() -> None:
    """End this process with SIGTERM when its standard input ends, if its starter asks for that.

    The processes that it starts itself do not: they end with it.
    """
    if os.environ.pop(_VARIABLE, None) is not None:
        Thread(target=_listen, daemon=True).start()


def _listen() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
