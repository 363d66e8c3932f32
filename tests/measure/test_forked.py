"""Results that are computed in a copy of the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest

from lit_ft.measure.forked import forked

pytestmark = pytest.mark.process


def test_the_result_comes_from_another_process_if_there_is_a_core_for_it(monkeypatch):
    with forked(os.getpid) as result:
        alone = len(os.sched_getaffinity(0)) < 2
        assert (result() == os.getpid()) is alone
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    with forked(os.getpid) as result:
        assert result() == os.getpid()


def test_a_copy_that_dies_or_fails_is_replaced_by_this_process():
    here = os.getpid()

    def dies() -> int:
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return 7

    def fails() -> int:
        raise ValueError("wrong")

    with forked(dies) as result:
        assert result() == 7
    with pytest.raises(ValueError, match="wrong"), forked(fails) as result:
        result()


def test_no_copy_outlives_its_block(tmp_path):
    number = tmp_path / "process"
    number.touch()

    def endless() -> None:
        number.write_text(str(os.getpid()))
        while True:
            signal.pause()

    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("there is no copy on a machine with one core")
    with pytest.raises(KeyError), forked(endless):
        while not number.read_text():
            pass
        raise KeyError
    with pytest.raises(ProcessLookupError):
        os.kill(int(number.read_text()), 0)


PARENT = """
import os, signal
from lit_ft.measure.forked import forked

def endless():
    print(os.getpid(), flush=True)
    while True:
        signal.pause()

with forked(endless):
    signal.pause()
"""


def test_a_copy_ends_with_its_parent():
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("there is no copy on a machine with one core")
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    copy = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    copy.wait(timeout=60)
