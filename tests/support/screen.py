"""A terminal in memory, and processes that run in one."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterator

import pyte

import train

SPINNER = re.compile("[⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏]")


class Screen:
    """A terminal of a number of columns and rows, which remembers what scrolls off its top."""

    def __init__(self, columns: int, rows: int) -> None:
        self.columns = columns
        self._screen = pyte.HistoryScreen(columns, rows, history=100_000)
        self._stream = pyte.ByteStream(self._screen)

    def write(self, text: bytes) -> None:
        self._stream.feed(text)

    @property
    def lines(self) -> list[str]:
        """All lines from the first on, without the empty ones at the end."""
        above = ["".join(row[x].data for x in range(self.columns)) for row in self.scrolled_off]
        lines = [line.rstrip() for line in (*above, *self._screen.display)]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    @property
    def scrolled_off(self) -> list:
        return list(self._screen.history.top)

    @property
    def shown(self) -> list[str]:
        return list(self._screen.display)

    @property
    def has_cursor(self) -> bool:
        return not self._screen.cursor.hidden


def live_lines(lines: list[str]) -> list[str]:
    return [line for line in lines if SPINNER.match(line)]


def in_terminal(
    columns: int, rows: int, *arguments: str, on_text: Callable[[int, bytes], None] | None = None
) -> tuple[int, list[tuple[float, bytes]]]:
    """Run `python train.py` in a terminal; return its status and what it wrote, with the times.

    Args:
        columns: The width of the terminal.
        rows: The height of the terminal.
        arguments: The arguments of train.py.
        on_text: Is called with the process and all text so far, as often as there is more.
    """
    process, terminal = pty.fork()
    if not process:
        os.environ |= {"OMP_NUM_THREADS": "1", "TERM": "xterm-256color"}
        os.execv(sys.executable, [sys.executable, train.__file__, *arguments])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    start, written = time.monotonic(), list[tuple[float, bytes]]()
    for text in _read(terminal):
        written.append((time.monotonic() - start, text))
        if on_text is not None:
            on_text(process, b"".join(text for _, text in written))
    _, status = os.waitpid(process, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status), written


def _read(terminal: int) -> Iterator[bytes]:
    while select.select([terminal], [], [], 120)[0]:
        try:
            text = os.read(terminal, 1 << 16)
        except OSError:  # the process has ended
            return
        if not text:
            return
        yield text
