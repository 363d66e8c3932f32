from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lit_ft.storage.building import building

KILLED = """
import os, signal, sys
from pathlib import Path
from lit_ft.storage.building import building

with building(Path(sys.argv[1])) as work:
    (work / "large").write_text("half a gigabyte")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_is_moved_away_stays_and_the_rest_goes(tmp_path: Path) -> None:
    with building(tmp_path / "cache") as work:
        (work / "kept").mkdir()
        (work / "scratch").write_text("x")
        (work / "kept").rename(tmp_path / "cache" / "kept")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["kept"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full"), building(tmp_path) as work:
        (work / "part").write_text("x")
        raise OSError("full")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert list(tmp_path.glob("*/large"))
    with building(tmp_path):
        assert not list(tmp_path.glob("*/large"))
    assert list(tmp_path.iterdir()) == []


def test_what_others_are_building_is_left_alone(tmp_path: Path) -> None:
    begun, end = threading.Event(), threading.Event()
    found: list[bool] = []

    def other() -> None:
        with building(tmp_path) as work:
            begun.set()
            end.wait(timeout=30)
            found.append(work.is_dir())

    thread = threading.Thread(target=other)
    thread.start()
    begun.wait(timeout=30)
    with building(tmp_path):
        pass
    end.set()
    thread.join()
    assert found == [True]
