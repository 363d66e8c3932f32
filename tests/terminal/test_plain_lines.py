"""Lines for stages that take time."""

from __future__ import annotations

import io
import threading
import time
from contextlib import redirect_stdout

import pytest

from lit_ft.terminal import PlainLines


def test_a_stage_that_ends_at_once_is_not_printed(capsys):
    lines = PlainLines(after=30)
    began = time.monotonic()
    with lines.stage("loading the model"):
        pass
    assert time.monotonic() - began < 5
    assert capsys.readouterr().out == ""


def test_a_long_stage_is_printed_and_how_far_it_is(capsys):
    lines = PlainLines(after=0.1, every=0.1)
    with lines.stage("encoding the data"):
        lines.detail("10/20 rows")
        time.sleep(0.5)
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == "encoding the data  10/20 rows"
    assert second == "encoding the data  10/20 rows  0:00"


class Notices(io.StringIO):
    """A file that says when it has been written to."""

    def __init__(self):
        super().__init__()
        self.is_written = threading.Event()

    def flush(self):
        self.is_written.set()


@pytest.mark.parametrize("detail", ["Encoding: 0 rows", "Writing model shards: 0/1it", "0/20 rows"])
def test_a_stage_that_has_done_nothing_yet_is_its_name(detail):
    out = Notices()
    lines = PlainLines(after=0.05, every=30)
    with redirect_stdout(out), lines.stage("exporting the model"):
        lines.detail(detail)
        assert out.is_written.wait(30)
    assert out.getvalue() == "exporting the model\n"
