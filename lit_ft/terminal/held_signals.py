"""Let signals wait while the terminal is written to."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

_ENDING = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR2")
    if hasattr(signal, name)  # Windows has the first two
]


@contextmanager
def held_signals() -> Iterator[None]:
    """Call Python's handlers of signals that come in this block after it.

    A handler may raise, as that of Ctrl-C does. rich would then not know what it has written so
    far, and would write it once more.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python calls handlers in the main thread only
        return
    came: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        came.append(number)

    def deliver() -> None:
        for number in dict.fromkeys(came):
            signal.raise_signal(number)

    with ExitStack() as after:
        after.callback(deliver)
        for number in _ENDING:
            handler = signal.getsignal(number)
            if callable(handler):
                after.callback(signal.signal, number, handler)
                signal.signal(number, hold)
        yield
