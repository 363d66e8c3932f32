"""The fuzzer of `make fuzz`, for a short time: no case fails, and it notices what should fail."""

from __future__ import annotations

import pytest

from tests.support import fuzz


@pytest.mark.slow
def test_no_case_of_a_short_run_fails():
    assert fuzz.fuzz(40, seed=0, targets=["configurations", "data", "checkpoints"]) == []


@pytest.mark.parametrize("target", ["data", "checkpoints"])
def test_damage_that_nothing_notices_is_a_failure(target, monkeypatch):
    monkeypatch.setattr(fuzz, "damage", lambda path: None)
    whole = fuzz.encoded

    def unnoticed(path):
        try:
            return whole(path)
        except ValueError:
            return []

    monkeypatch.setattr(fuzz, "encoded", unnoticed)
    failed = (case for case in range(200) if fuzz.failure_of(target, case, 1) is not None)
    first = next(failed)
    assert "damage was" in fuzz.failure_of(target, first, 1)  # which is the same case again


def test_a_case_without_end_and_a_bare_exception_are_failures(monkeypatch):
    def hangs(random, folder):
        while True:
            pass

    def raises(random, folder):
        raise KeyError("bare")

    monkeypatch.setattr(fuzz, "SECONDS", 1)
    monkeypatch.setattr(fuzz, "TARGETS", {"hangs": (1, hangs), "raises": (1, raises)})
    assert "no end after 1 s" in fuzz.failure_of("hangs", 0, 0)
    assert "KeyError: 'bare'" in fuzz.failure_of("raises", 0, 0)
