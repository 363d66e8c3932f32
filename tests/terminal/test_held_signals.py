"""A signal that comes while something is printed: the text appears once, and the signal counts."""

from __future__ import annotations

import io
import signal
import sys

import pytest

from lit_ft.terminal import LiveLine, console
from lit_ft.terminal.held_signals import held_signals

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("signals_as_usual")]


class Interrupting(io.StringIO):
    """A terminal in which Ctrl-C is pressed right after a text was written."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.awaited = text

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        written = super().write(text)
        if self.awaited in text:
            signal.raise_signal(signal.SIGINT)
        return written


@pytest.mark.parametrize("write", [lambda text: console().print(text), print])
def test_a_text_is_printed_once(monkeypatch, write):
    terminal = Interrupting("the table")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    line = LiveLine()
    with line.stage("loading"):
        with pytest.raises(KeyboardInterrupt):
            write("the table")
        write("and then")
    assert terminal.getvalue().count("the table") == 1
    assert "and then" in terminal.getvalue()


@pytest.mark.parametrize("code", ["\x1b[?25l", "\x1b[?25h"])
def test_a_line_that_appears_or_goes_leaves_a_cursor(monkeypatch, code):
    terminal = Interrupting(code)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(KeyboardInterrupt), LiveLine().stage("loading"):
        pass
    assert terminal.getvalue().count("\x1b[?25l") == terminal.getvalue().count("\x1b[?25h") == 1


def test_each_signal_counts_once_after_the_block():
    came = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        with held_signals(), held_signals():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            assert not came
        assert came == [signal.SIGTERM]
        signal.raise_signal(signal.SIGTERM)
        assert len(came) == 2
    finally:
        signal.signal(signal.SIGTERM, before)
