"""A run ends when the process that started it has gone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lit_ft.run.supervised import environment_of_supervised

CHILD = """
import os, subprocess, sys, time
from lit_ft.run.supervised import end_with_starter
end_with_starter()
print("ready", os.environ.get("LIT_FT_SUPERVISED"), flush=True)
time.sleep(60)
"""


def started(environment):
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD],
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "ready None\n"  # its own children go on
    return child


@pytest.mark.process
def test_it_ends_when_the_other_end_of_its_input_is_closed():
    child = started(environment_of_supervised())
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.5)
    child.stdin.close()  # as the system does for a process that was killed
    assert child.wait(30) == -15


@pytest.mark.process
def test_others_go_on():
    child = started({})
    child.stdin.close()
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.5)
    child.kill()
    child.wait()
