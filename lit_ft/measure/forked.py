"""Compute something in a copy of this process, on another core."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from threading import Thread
from typing import Any, TypeVar

import torch

from lit_ft.compat.cores import usable_cores

T = TypeVar("T")


@contextmanager
def forked(function: Callable[[], T]) -> Iterator[Callable[[], T]]:
    """Call `function` in a copy of this process; the block gets a function that waits for it.

    The copy has all that this process has loaded, so nothing is imported again. Where there is no
    second core or no safe way to copy a process, and if the copy fails, the function is called in
    this process when its result is waited for. An error is raised there too.

    Args:
        function: The function, whose result can be pickled.
    """
    if sys.platform != "linux" or usable_cores() < 2:
        yield function
        return
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(function, sender), daemon=True)
    process.start()
    sender.close()

    def result() -> T:
        try:
            found: T = receiver.recv()
        except EOFError:
            return function()
        return found

    try:
        yield result
    finally:
        process.kill()
        process.join()
        receiver.close()


def _send(function: Callable[[], Any], sender: Connection) -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)  # the threads of the other process are not in the copy
    try:
        sender.send(function())
    except BaseException:
        os._exit(1)  # without a word: the other process meets the same error


def _end_with_parent() -> None:
    """End this process when its parent ends, which may be killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
