"""A run ends when the process that started it has gone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import train
from lit_ft.run.files import read_summary
from lit_ft.run.supervised import environment_of_supervised
from tests.support.commands import TINY

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


@pytest.mark.process
def test_a_run_is_stopped_by_it_and_says_so(tmp_path):
    process = subprocess.Popen(
        [sys.executable, train.__file__, *TINY, f"run_dir={tmp_path}", "trainer.max_steps=5000"],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment_of_supervised()},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("step "):
            process.stdin.close()
    assert process.wait(60) == 143
    assert read_summary(tmp_path)["status"] == "interrupted"
