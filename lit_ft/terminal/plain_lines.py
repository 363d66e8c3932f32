"""A line for each stage that takes time, for files and pipes."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from lit_ft.terminal.console import format_duration
from lit_ft.terminal.display import Display

_BEGINS = re.compile(r"(^|[: ])0[/ ]")  # nothing is done yet


class PlainLines(Display):
    """Prints a stage once it has taken a second, and then now and again how far it is.

    Args:
        after: The seconds after which a stage is printed.
        every: The seconds between two lines of the same stage.
    """

    def __init__(self, after: float = 1.0, every: float = 30.0) -> None:
        self.after = after
        self.every = every
        self._detail = ""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Print what is being done in this block, unless it ends at once."""
        over = threading.Event()
        watch = threading.Thread(target=self._watch, args=(name, over), daemon=True)
        watch.start()
        try:
            yield
        finally:
            self._detail = ""
            over.set()
            watch.join()  # a line that comes later would stand among those of the next stage

    def detail(self, text: str) -> None:
        """Keep how far the stage is for its next line."""
        self._detail = text

    def _watch(self, name: str, over: threading.Event) -> None:
        began = time.monotonic()
        if not over.wait(self.after):
            self._print(name)
        while not over.wait(self.every):
            self._print(name, format_duration(time.monotonic() - began))

    def _print(self, name: str, took: str = "") -> None:
        detail = "" if _BEGINS.search(self._detail) else self._detail
        print("  ".join(filter(None, (name, detail, took))), flush=True)
