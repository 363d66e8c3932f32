"""What libraries need, and what signals do, while libraries load."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lit_ft.terminal import display, stage


@contextmanager
def loading_libraries() -> Iterator[None]:
    """Show that libraries load in this block, and keep the garbage collector from what they make.

    They make a million objects, which stay. The collector would go through all of them several
    times while they load, at each of its full rounds later on, and again before the process ends,
    where it takes a second.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with stage("loading libraries"):
            yield
    finally:
        if not gc.get_freeze_count():  # a later job of a sweep may have left what is to be freed
            gc.freeze()
        if was_enabled:
            gc.enable()


@contextmanager
def ended_at_once_by_signals() -> Iterator[None]:
    """End the process if Ctrl-C, SIGTERM or SIGHUP comes in this block, where nothing can be lost.

    An exception would not do: what a signal raises while Python imports a module is lost if it
    meets a callback of Python's own or a bare `except`. Handlers that somebody has chosen stay.
    """
    before = {number: signal.getsignal(number) for number in _signals()}
    for number in before:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _signals() -> Iterator[signal.Signals]:
    """Yield the signals that end a process and have Python's own handlers."""
    if threading.current_thread() is not threading.main_thread():
        return
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # the last one is missing on Windows
        number = getattr(signal, name, None)
        usual = (signal.SIG_DFL, signal.default_int_handler)
        if number is not None and signal.getsignal(number) in usual:
            yield number


def _end(number: int, frame: FrameType | None) -> None:
    display().close()
    os._exit(128 + number)
