"""debug=: each choice shows what it is for."""

from __future__ import annotations

from tests.support.running import run_job

TINY = ["model=tiny", "data.max_length=160", "logger=none", "~callbacks.samples"]


def test_overfit_learns_its_rows_by_heart(tmp_path):
    options = ["~callbacks.export", "data.batch_size=2", "optim.lr=1e-2", "galore.rank=16"]
    summary = run_job(tmp_path, *TINY, *options, "debug=overfit")
    assert summary["steps"] == 40
    # Two examples out of thousands: their loss falls to nothing, that of others does not.
    assert summary["train_loss"] < 0.2 * summary["initial_val_loss"]
    assert summary["val_loss"] > 0.5 * summary["initial_val_loss"]


def test_profile_leaves_a_table_and_a_trace(tmp_path):
    run_job(tmp_path, *TINY, "debug=profile", "optim=sgd")
    assert "Optimizer.step#SGD" in (tmp_path / "profile/fit-profile.txt").read_text()
    assert list((tmp_path / "profile").glob("fit-profile*.pt.trace.json"))


def test_few_batches_runs_from_end_to_end(tmp_path):
    summary = run_job(tmp_path, *TINY, "debug=few_batches", "optim=sgd")
    assert (summary["status"], summary["steps"]) == ("completed", 3)
    assert summary["export_path"] and summary["checkpoint_path"]
