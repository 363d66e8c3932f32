"""`python -m lit_ft.compare` on runs of `python train.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lit_ft.storage.json_file import read_json
from tests.support.commands import TINY, run

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "lightning", "transformers")


@pytest.mark.process
def test_two_runs_are_compared_from_their_summaries(tmp_path):
    runs = tmp_path / "runs"
    for seed in (0, 1):
        own = [f"run_dir={runs}/{seed}", f"seed={seed}", "optim=adamw", "trainer.max_steps=4"]
        status, output = run(*TINY, *own, "trainer.log_every_n_steps=1")
        assert status == 0, output
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "lit_ft.compare", str(runs)],
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not loaded & set(HEAVY)  # it reads four files

    told = read_json(runs / "report.json")
    [row] = told["rows"]
    [trial] = row["trials"]
    summaries = [read_json(runs / str(seed) / "summary.json") for seed in (0, 1)]
    assert trial["seeds"] == [0, 1]
    assert trial["val_loss"] == pytest.approx(sum(one["val_loss"] for one in summaries) / 2)
    assert trial["peak_bytes"] == max(one["peak_bytes"]["value"] for one in summaries)
    assert trial["checkpoint_disk_bytes"] > trial["export_disk_bytes"] > 0
    assert (told["warnings"], told["without_result"]) == ([], [])
    page, md, table = ((runs / f"report.{ending}").read_text() for ending in ("html", "md", "csv"))
    assert page.count('<svg role="img"') == 3  # a tiny run is not planned
    assert f"{trial['val_loss']:.4f} ±" in md and f"{trial['val_loss']:.4f} ±" in done.stdout
    assert str(trial["val_loss"]) in table
    assert f"run_dir={runs}/1" in md


@pytest.mark.process
def test_a_method_is_trained_at_its_best_rate_and_kept(tmp_path):
    folder = tmp_path / "methods"
    asked = ["-m", *(one for one in TINY if "samples" not in one), "optim=sgd"]
    asked += ["optim.lr=1e-1,1e-5", "trainer.max_steps=4", f"run_dir={folder}"]

    def compared():
        return subprocess.run(
            [sys.executable, "-m", "lit_ft.compare", *asked],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=400,
        )

    done = compared()
    assert done.returncode == 0, done.stderr
    assert "run 1 of about 2: " in done.stdout and "run 2 of about 2: " in done.stdout
    told = read_json(folder / "report.json")
    assert [trial["learning_rate"] for row in told["rows"] for trial in row["trials"]] == [1e-1]
    assert [one["status"] for one in told["without_result"]] == ["pruned"]
    written = {file: file.stat().st_mtime_ns for file in folder.glob("*/summary.json")}
    assert len(written) == 2 and not list(folder.rglob("*.ckpt")) + list(folder.rglob("export"))

    again = compared()
    assert again.returncode == 0, again.stderr
    assert {file: file.stat().st_mtime_ns for file in folder.glob("*/summary.json")} == written
    assert read_json(folder / "report.json")["rows"] == told["rows"]


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "Name what to compare"),
        (["no/such/folder"], "no/such/folder does not exist"),
        (["-m", "optim=adamw,adamx"], "adamx"),
        (["-m", "optim.lr=fast"], "optim.lr=fast: must be a number"),
        (["-m", "data.max_length=four"], "data.max_length"),
    ],
)
def test_what_is_wrong_is_named_before_anything_trains(tmp_path, arguments, named):
    done = subprocess.run(
        [sys.executable, "-m", "lit_ft.compare", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and named in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
