"""One line that changes, in a terminal that is replayed from what was written to it."""

from __future__ import annotations

import io
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text
from tqdm import tqdm

import lit_ft.terminal.libraries
import lit_ft.terminal.live_line
from lit_ft.terminal import LiveLine
from lit_ft.terminal.display import Display, display, set_display
from lit_ft.terminal.libraries import adopt_bars, adopt_logs
from lit_ft.terminal.live_line import one_line
from tests.support.screen import Screen, live_lines

PRINTED = st.characters(exclude_categories=["C", "Z"])
FACTS = ["step 117/300", "loss 1.82", "412 tok/s", "5.0 GiB", "lr 8.2e-05", "eta 0:18"]


class Terminal(io.StringIO):
    """Standard output and error of a process in a terminal."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.screen = Screen(columns, 10)
        self.most_live = 0

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.screen.write(text.replace("\n", "\r\n").encode())  # as a terminal's driver does
        self.most_live = max(self.most_live, len(live_lines(self.screen.shown)))
        return len(text)


@contextmanager
def terminal_of(columns: int) -> Iterator[Terminal]:
    """Give a terminal with a `LiveLine` as the process's display."""
    terminal = Terminal(columns)
    one = Console(force_terminal=True, width=columns, height=10, color_system=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        patch.setattr(sys, "stderr", terminal)
        for module in (lit_ft.terminal.live_line, lit_ft.terminal.libraries):
            patch.setattr(module, "console", lambda: one)
        set_display(LiveLine())
        try:
            yield terminal
        finally:
            display().progress(())
            set_display(Display())


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_lines_that_are_printed_stand_above_the_one_that_changes(columns):
    with terminal_of(columns) as terminal:
        display().progress(FACTS)
        print("printed")
        print("an error", file=sys.stderr)
        [line] = live_lines(terminal.screen.shown)
        assert line[2:].startswith("step 117/300 · loss 1.82")
        assert terminal.screen.shown.index(line) == 2
        display().progress(())
        assert terminal.screen.lines == ["printed", "an error"]
        assert terminal.screen.has_cursor


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_stage_takes_the_place_of_the_progress_and_gives_it_back(columns):
    with terminal_of(columns) as terminal:
        display().progress(FACTS)
        with display().stage("saving a checkpoint"), display().stage("writing"):
            time.sleep(0.3)
            assert live_lines(terminal.screen.shown)[0][2:].startswith("writing · 0:00")
        time.sleep(0.3)
        assert live_lines(terminal.screen.shown)[0][2:].startswith("step 117/300")
        assert terminal.most_live == 1


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_an_error_in_a_stage_leaves_a_clean_terminal(columns):
    with terminal_of(columns) as terminal:
        with pytest.raises(ZeroDivisionError), display().stage("loading the model"):
            1 / 0  # noqa: B018
        assert terminal.screen.lines == []
        assert terminal.screen.has_cursor
        assert sys.stdout is terminal


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_the_bars_and_logs_of_libraries_appear_where_they_belong(columns, monkeypatch):
    with terminal_of(columns) as terminal:
        monkeypatch.setattr(tqdm, "__init__", tqdm.__init__)
        logger = logging.Logger.manager.getLogger("tests.of.a.library")
        logger.propagate = False
        logger.addHandler(logging.StreamHandler(io.StringIO()))
        adopt_bars.__wrapped__()
        adopt_logs()
        said = "a message of words that is longer than a line of a narrow terminal would ever be"
        with display().stage("loading the model"):
            for _ in tqdm(range(3), desc="Loading weights", unit=" files", mininterval=0):
                time.sleep(0.2)
                logger.warning(said)
            assert "loading the model" in live_lines(terminal.screen.shown)[0]
        logger.warning(said)
        lines = [line.strip() for line in terminal.screen.lines]
        assert " ".join(lines) == " ".join([said] * 4)  # no word is broken, and no bar is left
        assert terminal.most_live == 1
        logger.handlers.clear()


def test_there_is_no_line_while_a_process_forks(monkeypatch):
    hooks = {}
    monkeypatch.setattr("os.register_at_fork", lambda **given: hooks.update(given))
    with terminal_of(80) as terminal:
        display().progress(FACTS)
        hooks["before"]()
        assert (terminal.screen.lines, terminal.screen.has_cursor) == ([], True)
        assert sys.stdout is terminal
        hooks["after_in_parent"]()
        print("printed")
        assert live_lines(terminal.screen.shown)
        hooks["before"]()
        hooks["after_in_child"]()
        print("printed in the child")
        assert terminal.screen.lines == ["printed", "printed in the child"]


@given(st.lists(st.text(PRINTED), max_size=8), st.integers(1, 100))
def test_facts_are_left_out_from_the_right_until_they_fit(facts, width):
    line = one_line(Text("*"), facts, " · ", width)
    shown = line.plain[2:].split(" · ") if facts else []
    written = [" ".join(fact.split()) for fact in facts]
    assert "\n" not in line.plain
    assert " · ".join(written).startswith(" · ".join(shown))
    assert len(shown) <= 1 or cell_len(line.plain) <= width
