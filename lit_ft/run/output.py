"""Rewrite the texts that a process prints, whoever prints them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, TextIO

Rewrite = Callable[[str], str]


def rewrite_output(rewrite: Rewrite) -> None:
    """Rewrite each text that is written to standard output and standard error from now on.

    Args:
        rewrite: The function that takes a text and returns what is written in its place. A second
            call with the same function changes nothing.
    """
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        is_done = isinstance(stream, _RewritingStream) and stream.rewrite is rewrite
        if stream is not None and not is_done:
            setattr(sys, name, _RewritingStream(stream, rewrite))


class _RewritingStream:
    """A text stream that rewrites what is written to another one."""

    def __init__(self, stream: TextIO, rewrite: Rewrite) -> None:
        self.rewrite = rewrite
        self._stream = stream
        self._write = stream.write

    @property
    def write(self) -> Callable[[str], int]:
        """The function that writes. wandb puts one in its place, which gets rewritten texts too."""
        write, rewrite = self._write, self.rewrite
        return lambda text: write(rewrite(text))

    @write.setter
    def write(self, write: Callable[[str], int]) -> None:
        self._write = write

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
