"""The styles from which a user chooses."""

from __future__ import annotations

import io

import pytest

from lit_ft.callbacks import LineProgress, ProgressBar, TerminalProgress
from lit_ft.terminal import LiveLine, PlainLines, resolved, use_style
from lit_ft.terminal.console import console
from lit_ft.terminal.display import Display, display, set_display


@pytest.fixture(autouse=True)
def _as_before():
    yield
    set_display(Display())
    console().quiet = False


@pytest.mark.parametrize(
    ("style", "kind", "bar"),
    [("rich", LiveLine, TerminalProgress), ("plain", PlainLines, LineProgress)],
)
def test_a_style_is_a_display_and_a_progress_bar(style, kind, bar, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    use_style(style)
    first = display()
    assert type(first) is kind
    assert type(ProgressBar()) is bar
    use_style(style)
    assert display() is first  # a line may be on the screen
    console().print("said")
    assert "said" in capsys.readouterr().out


def test_off_is_silent(capsys):
    use_style("off")
    console().print("a table")
    ProgressBar().print("progress")
    assert capsys.readouterr().out == ""


def test_a_pipe_gets_plain_lines():
    use_style("auto")
    assert type(display()) is PlainLines


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_only_the_first_of_several_ranks_shows_anything(monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    use_style("rich")
    assert type(display()) is Display


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
