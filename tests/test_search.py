"""`python -m lit_ft.search` on runs of `python train.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lit_ft.storage.json_file import read_json
from tests.support.commands import TINY

ROOT = Path(__file__).parents[1]


def search(*arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, "-m", "lit_ft.search", *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=400,
    )


@pytest.mark.process
def test_trials_train_and_the_report_reads_them(tmp_path):
    own = [one for one in TINY if "samples" not in one]
    asked = ["-m", *own, "optim=sgd", "optim.lr=tag(log,interval(1e-6,1e3))"]
    asked += ["trainer.max_steps=4", f"run_dir={tmp_path}/s"]
    done = search(*asked, "--trials", "2")
    assert done.returncode == 0, done.stderr
    summaries = [read_json(file) for file in (tmp_path / "s").glob("*/summary.json")]
    losses = [one["val_loss"] for one in summaries if one["status"] == "completed"]
    assert len(summaries) == 2 and losses
    assert f"held-out loss {min(losses):.4f}\n  python train.py " in done.stdout
    told = read_json(tmp_path / "s" / "report.json")
    [row] = told["rows"]
    assert min(trial["val_loss"] for trial in row["trials"]) == min(losses)
    again = search(*asked, "--trials", "2")
    assert again.returncode == 0 and len(list((tmp_path / "s").glob("*/summary.json"))) == 2


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "Name what to search"),
        (["hparams_search=galor"], "galore"),
        (["optim=adamw,adamx"], "adamx"),
        (["galore.rank=0,64"], "galore.rank=0"),
        (["optim.lr=interval(-1,1)"], "optim.lr=-1"),
    ],
)
def test_what_is_wrong_is_named_before_anything_trains(tmp_path, arguments, named):
    done = search(*arguments, cwd=tmp_path)
    assert done.returncode == 1 and named in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
