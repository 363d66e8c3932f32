"""A run of a comparison: a process that may be killed, and one that an earlier process has left."""

from __future__ import annotations

from threading import Event, Timer

import pytest
from filelock import FileLock

from lit_ft.comparison import cells
from lit_ft.comparison.cells import Cell
from lit_ft.storage.json_file import write_json

WRITES = """
import json, pathlib, sys
folder = pathlib.Path(next(a[8:] for a in sys.argv if a.startswith("run_dir=")))
summary = {"status": "completed", "config": {}, "val_loss": 1.0}
(folder / "summary.json").write_text(json.dumps(summary))
"""


@pytest.fixture
def cell(tmp_path, monkeypatch):
    """Make a run whose train.py is in the test's folder."""
    monkeypatch.setattr(cells, "ROOT", tmp_path)
    (tmp_path / "run").mkdir()
    return Cell((), tmp_path / "run", "run")


@pytest.mark.process
def test_a_run_that_the_system_kills_is_one_that_failed(cell, tmp_path):
    (tmp_path / "train.py").write_text("import os\nos.kill(os.getpid(), 9)")
    summary = cell.run({}, Event())
    assert summary["status"] == "failed" and "memory" in summary["ended"]
    assert cell.finished() is None  # it is tried again


@pytest.mark.process
def test_what_a_run_says_is_passed_on_if_it_cannot_begin(cell, tmp_path):
    (tmp_path / "train.py").write_text("print('no such thing')")
    with pytest.raises(ValueError, match="no such thing"):
        cell.run({}, Event())


@pytest.mark.process
def test_an_event_ends_a_run(cell, tmp_path):
    (tmp_path / "train.py").write_text("import time\ntime.sleep(600)")
    stopped = Event()
    Timer(0.5, stopped.set).start()
    with pytest.raises(ValueError, match="did not finish"):
        cell.run({}, stopped)


@pytest.mark.process
def test_a_run_waits_for_the_one_that_is_left_in_its_folder(cell, tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text(WRITES)
    left = FileLock(cell.folder / ".lock")
    left.acquire()
    monkeypatch.setattr(cells, "_LAST_STEP", 0.1)
    with pytest.raises(ValueError, match="another run is going on"):
        cell.run({}, Event())
    left.release()
    assert cell.run({}, Event())["status"] == "completed"


def test_a_damaged_summary_is_no_result(cell):
    write_json(cell.folder / "summary.json", {"status": "completed", "config": {}, "val_loss": 1.0})
    assert cell.finished() is not None
    (cell.folder / "summary.json").write_text("{")
    assert cell.finished() is None
