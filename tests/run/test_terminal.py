"""What a person sees: real runs in a terminal, replayed moment by moment."""

from __future__ import annotations

import os
import signal

import pytest

from tests.support.commands import TINY
from tests.support.screen import Screen, in_terminal, live_lines

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("signals_as_usual")]

RUN = [*TINY, "trainer.max_steps=40", "trainer.val_check_interval=20", "optim=adamw"]


def replayed(written: list[tuple[float, bytes]], columns: int, rows: int) -> Screen:
    """Return the screen at the end; at no moment is there a second live line, or a broken one."""
    screen = Screen(columns, rows)
    for _, text in written:
        screen.write(text)
        shown = screen.shown
        for place in [place for place, line in enumerate(shown) if live_lines([line])]:
            assert not "".join(shown[place + 1 :]).strip(), "\n".join(shown)
    assert not live_lines(screen.lines)
    assert screen.has_cursor
    return screen


@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (200, 50)])
def test_one_line_shows_the_whole_run_and_what_was_said_stays(tmp_path, columns, rows):
    status, written = in_terminal(columns, rows, f"run_dir={tmp_path}/run", *RUN)
    screen = replayed(written, columns, rows)
    assert status == 0, "\n".join(screen.lines)
    text = "".join(text.decode(errors="ignore") for _, text in written)
    stages = ("loading libraries", "loading the tokenizer", "step 0/40")
    places = [text.index(stage) for stage in stages]
    assert places == sorted(places)
    history = [line for line in screen.lines if line.startswith(("validation at", "step"))]
    assert [line.split(" · ")[0] for line in history] == [
        "validation at step 0",
        "validation at step 20",
        "validation at step 40",
        "step 40/40",
        "validation at step 40",
    ]
    said = " ".join(screen.lines)
    assert "3,143 examples, 332,748 tokens, 70,533 targets; 3,059 dropped as too" in said


@pytest.mark.parametrize("moment", ["loading", "step 0/"])
def test_ctrl_c_leaves_a_clean_terminal(tmp_path, moment):
    sent = []

    def interrupt(process: int, text: bytes) -> None:
        if moment.encode() in text and not sent:
            sent.append(os.kill(process, signal.SIGINT))

    arguments = [f"run_dir={tmp_path}/run", *RUN, "trainer.max_steps=2000"]
    status, written = in_terminal(80, 24, *arguments, on_text=interrupt)
    screen = replayed(written, 80, 24)
    assert status == 130, "\n".join(screen.lines)


def test_an_error_leaves_a_clean_terminal(tmp_path):
    status, written = in_terminal(80, 24, f"run_dir={tmp_path}/run", *RUN, "optim.lr=1e30")
    screen = replayed(written, 80, 24)
    assert status == 1
    assert "not finite" in " ".join(screen.lines) or "nan" in " ".join(screen.lines)
