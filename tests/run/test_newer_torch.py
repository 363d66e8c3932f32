"""A run on a torch that no test has seen says so, and goes on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lit_ft.measure.environment import newer_torch
from lit_ft.run.job import fine_tune


@pytest.mark.parametrize(
    ("version", "newer"),
    [
        ("2.12.1", False),
        ("2.13.0+cpu", False),
        ("2.13.7", False),  # a patch release
        ("2.14.0.dev20260101+cu130", True),
        ("2.14.0", True),
        ("3.0.0", True),
    ],
)
def test_only_another_minor_release_is_newer(
    version: str, newer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    assert newer_torch() == (version if newer else None)


def test_a_run_says_so_once_at_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing: Any = None
    ends_at_once: Any = SimpleNamespace(limit_val_batches=0)
    monkeypatch.setattr(torch, "__version__", "9.9.0")
    with (
        pytest.warns(UserWarning, match=r"torch 9\.9\.0.*tested on 2\.13") as told,
        pytest.raises(MisconfigurationException),
    ):
        fine_tune(nothing, nothing, ends_at_once, nothing)
    assert len([one for one in told if "torch 9.9.0" in str(one.message)]) == 1
