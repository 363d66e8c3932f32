"""Which style suits the output."""

from __future__ import annotations

import io

import pytest

from lit_ft.terminal import resolved


class Output(io.StringIO):
    def __init__(self, *, is_terminal: bool) -> None:
        super().__init__()
        self.isatty = lambda: is_terminal


@pytest.mark.parametrize(
    ("is_terminal", "environment", "auto", "rich"),
    [
        (True, {}, "rich", "rich"),
        (True, {"TERM": "dumb"}, "plain", "plain"),
        (False, {}, "plain", "plain"),  # a line that changes would never be seen
        (False, {"FORCE_COLOR": "1"}, "plain", "rich"),
    ],
)
def test_a_line_that_changes_needs_a_terminal(is_terminal, environment, auto, rich, monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout", Output(is_terminal=is_terminal))
    assert (resolved("auto"), resolved("rich")) == (auto, rich)
    assert (resolved("plain"), resolved("off")) == ("plain", "off")
