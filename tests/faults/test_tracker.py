"""A tracker that cannot be reached, or that takes no login."""

from __future__ import annotations

import pytest
from hydra.errors import CompactHydraException

from lit_ft.run.files import read_summary
from tests.support.commands import TINY
from tests.support.running import run_job


def test_a_tracker_without_a_login_is_told_before_the_model_loads(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # where a login would be kept
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(CompactHydraException, match="WANDB_MODE=offline"):
        run_job(tmp_path / "run", *TINY, "logger=wandb")
    assert read_summary(tmp_path / "run")["model"]["parameters"] is None
