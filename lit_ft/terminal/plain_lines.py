"""A line for each stage that takes time, for files and pipes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from lit_ft.terminal.console import format_duration
from lit_ft.terminal.display import Display


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
            print(name, flush=True)
        while not over.wait(self.every):
            took = format_duration(time.monotonic() - began)
            print("  ".join(filter(None, (name, self._detail, took))), flush=True)
