"""One object in a process of its own, so that it finds the memory that its user would."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from types import TracebackType
from typing import Any, Self

_held: Any  # of the object's process


class OwnProcess:
    """A process that makes one object and holds it. It ends when its `with` or its parent does.

    Args:
        make: makes the object, in the new process
        arguments: what `make` is called with
    """

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        self._pool = ProcessPoolExecutor(
            1, get_context("spawn"), initializer=_start, initargs=(make, arguments)
        )

    def call(self, method: Callable[[Any], Any]) -> Any:
        """Call a method of the object, wait for it and return what it returns."""
        return self._pool.submit(_call, method).result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown()


def _start(make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    global _held
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    _held = make(*arguments)


def _end_with_the_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(method: Callable[[Any], Any]) -> Any:
    return method(_held)
