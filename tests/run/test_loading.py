"""What libraries need, and what signals do, while libraries load."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from lit_ft.before_libraries import let_waiting_threads_sleep

pytestmark = pytest.mark.usefixtures("signals_as_usual")

# As an import that meets the exception in a callback of Python's own, and drops it.
DROPS_EXCEPTIONS = """
import time
from lit_ft.run.loading import ended_at_once_by_signals

with ended_at_once_by_signals():
    print("loading", flush=True)
    while True:
        try:
            time.sleep(0.05)
        except BaseException:
            pass
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_process_though_an_exception_would_be_lost(number):
    process = subprocess.Popen(
        [sys.executable, "-c", DROPS_EXCEPTIONS], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "loading\n"
    process.send_signal(number)
    assert process.wait(30) == 128 + number
    process.stdout.close()


def test_handlers_that_somebody_has_chosen_stay():
    from lit_ft.run.loading import ended_at_once_by_signals

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with ended_at_once_by_signals():
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("chosen, expected", [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_threads_sleep_unless_the_user_has_chosen(monkeypatch, chosen, expected):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if chosen is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", chosen)
    let_waiting_threads_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == expected
