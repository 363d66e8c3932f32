"""benchmarks/peers.py: each row trains, and its figures are compared as the page says."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from support.composed import composed
from support.peers.figures import SAME, check_same_batches, latest, summary, verdicts
from support.peers.job import SETTINGS, Job
from support.peers.meter import Meter
from support.peers.one import in_short
from support.peers.page import as_markdown, cells, index_figures
from support.peers.processes import Processes
from support.peers.rows import PEERS, ROWS, TRAINED
from support.peers.weights import largest_difference
from support.peers.with_lit_ft import LitFt
from support.peers.work import overrides
from support.preloaded import run_python

ROOT = Path(__file__).parents[2]
RUN = {
    "hardware": {"cpu": "a CPU"},
    "threads": 1,
    "date": "2026-12-01",
    "commit": "0" * 40,
    "command": "python benchmarks/peers.py",
    "versions": {"torch": "2.13"},
}
PAGE = {"model": "tiny", "steps": 2, "batch_size": 2}


def job(folder: Path, **changes: Any) -> Job:
    job = Job(
        rate=1e-4,
        seed=0,
        model="tiny",
        steps=2,
        batch_size=2,
        max_length=128,
        val_examples=4,
        threads=1,
        folder=str(folder),
    )
    return dataclasses.replace(job, **changes)


def trained(row: str, *, lr: float = 1e-4, seed: int = 0, **figures: Any) -> dict[str, Any]:
    usual = {
        "held_out_loss": 2.0,
        "peak_bytes": 2**30,
        "rss_growth_bytes": 2**29,
        "tokens_per_second": {"median": 100.0},
        "step_seconds": {"median": 1.0},
        "first_step_seconds": 1.5,
        "rate_at_end": 0.1 * lr,
        "batches": f"of seed {seed}",
    }
    return {**RUN, "kind": "train", "row": row, "lr": lr, "seed": seed, **usual, **figures}


def resumed(row: str, **found: Any) -> dict[str, Any]:
    return {**RUN, "kind": "resume", "row": row, **found}


def in_turn(number: int, times: float) -> dict[str, Any]:
    speeds = {"hf_adamw": {"median": 100.0}, "adamw": {"median": 100.0 * times}}
    pair = {"kind": "speed", "peer": "hf_adamw", "ours": "adamw", "round": number}
    return {**RUN, **pair, "tokens_per_second": speeds, "times_as_fast": {"median": times}}


def words(*records: dict[str, Any]) -> dict[str, str]:
    return {verdict.column: verdict.word for verdict in verdicts(records)}


def test_each_peer_is_held_against_rows_of_ours():
    ours = set(TRAINED) - set(PEERS)
    assert ours == {name for row in PEERS.values() for name in row.against}
    assert all(len(ROWS[name].rates) == 3 for name in TRAINED)


@pytest.mark.parametrize("model", SETTINGS)
@pytest.mark.parametrize("row", [name for name in ROWS if isinstance(ROWS[name].way, LitFt)])
def test_rows_of_ours_compose(row, model, tmp_path):
    GlobalHydra.instance().clear()
    settings = job(tmp_path, model=model)
    chosen = [settings.filled(one) for one in ROWS[row].way.arguments.split()]
    config = composed(*overrides(settings), *chosen, f"optim.lr={settings.rate}")
    assert config["optim"]["lr"] == settings.rate


def test_a_row_shows_its_best_rate_and_whether_it_is_at_the_edge():
    records = [trained("adamw", lr=lr, held_out_loss=loss) for lr, loss in ((1, 2.0), (2, 1.0))]
    row = summary(records, "adamw")
    assert (row.rate, row.loss, row.at_edge) == (2, 1.0, True)
    assert cells(row)[1:3] == ["2 (2)*", "1.0000"]
    diverged = trained("adamw", lr=3, held_out_loss=None)
    assert not summary([*records, diverged], "adamw").at_edge


def test_a_run_that_failed_and_ran_again_counts_once():
    failed = {**RUN, "kind": "train", "row": "adamw", "lr": 1e-4, "seed": 0, "error": "no room"}
    found = latest([failed, trained("hf_adamw"), trained("adamw")])
    assert [record["row"] for record in found] == ["adamw", "hf_adamw"]
    assert summary(found, "adamw").error is None


def test_a_row_that_fails_shows_its_reason():
    failed = {**RUN, "kind": "train", "row": "hf_apollo", "lr": 1e-4, "seed": 0, "error": "no room"}
    page = as_markdown([failed], PAGE)
    assert "| Trainer, apollo_adamw | fails |" in page
    assert "- Trainer, apollo_adamw: A run fails: no room" in page


@pytest.mark.parametrize(("ratio", "word"), [(0.9, "ahead"), (1.005, "level"), (1.1, "behind")])
def test_less_memory_is_ahead(ratio, word):
    found = words(trained("hf_adamw"), trained("adamw", peak_bytes=ratio * 2**30))
    assert found["peak"] == word
    assert found["held-out loss"] == "level"


@pytest.mark.parametrize(
    ("theirs", "ours", "word"),
    [(0, 0, "level"), (0, 2**20, "behind"), (2**20, 0, "ahead"), (2**20, -(2**20), "ahead")],
)
def test_a_process_may_not_grow_at_all(theirs, ours, word):
    records = (
        trained("hf_adamw", rss_growth_bytes=theirs),
        trained("adamw", rss_growth_bytes=ours),
    )
    assert words(*records)["growth of the process"] == word


def test_a_growth_that_cannot_be_measured_is_not_compared():
    records = (trained("hf_adamw", rss_growth_bytes=None), trained("adamw"))
    assert "growth of the process" not in words(*records)


@pytest.mark.parametrize(
    ("theirs", "ours", "word"),
    [(None, None, "level"), (None, 2.0, "ahead"), (2.0, None, "behind"), (2.0, 2.0, "level")],
)
def test_rows_that_both_diverge_are_level(theirs, ours, word):
    records = (trained("hf_adamw", held_out_loss=theirs), trained("adamw", held_out_loss=ours))
    assert words(*records)["held-out loss"] == word


def test_losses_are_compared_on_the_seeds_that_both_have():
    losses = enumerate((2.0, 2.2, 2.4))
    theirs = [trained("hf_adamw", seed=seed, held_out_loss=loss) for seed, loss in losses]
    assert words(*theirs, trained("adamw"))["held-out loss"] == "level"
    assert "held-out loss" not in words(theirs[1], trained("adamw"))


@pytest.mark.parametrize(
    ("rounds", "word"),
    [((1.2, 1.1), "ahead"), ((0.9, 1.1), "level"), ((0.8, 0.9), "behind")],
)
def test_rounds_must_agree_on_who_is_faster(rounds, word):
    assert words(*(in_turn(*each) for each in enumerate(rounds)))["tokens/s"] == word


@pytest.mark.parametrize(
    ("theirs", "ours", "word"),
    [
        ({"largest_difference": 0.0}, {"largest_difference": 0.0}, "level"),
        ({"error": "weights only"}, {"largest_difference": 0.0}, "ahead"),
        ({"largest_difference": 0.0}, {"largest_difference": 1e-3}, "behind"),
    ],
)
def test_the_same_weights_after_a_resume_are_ahead(theirs, ours, word):
    records = (resumed("hf_adamw", **theirs), resumed("adamw", **ours))
    assert words(*records) == {"resumes": word}
    assert index_figures(records) == [
        f"{int(word == 'ahead')} of 1",
        f"level in {int(word == 'level')}",
    ]


def test_the_page_says_where_ours_is_not_ahead():
    records = [trained("hf_adamw"), trained("adamw", peak_bytes=2**31)]
    page = as_markdown(records, PAGE)
    line = "- Trainer, adamw_torch, peak: behind, 2,048 MiB (lit_ft, adamw) against 1,024 MiB."
    assert f"{line} No reason is known yet." in page


def test_rows_on_other_batches_are_refused():
    check_same_batches([trained("adamw"), trained("hf_adamw"), trained("adamw", seed=1)])
    with pytest.raises(ValueError, match="hf_adamw has trained on other batches"):
        check_same_batches([trained("adamw"), trained("hf_adamw", batches="others")])


def test_weights_differ_by_a_share_of_a_tensors_largest_value():
    one = {"a": torch.tensor([1.0, -4.0]), "b": torch.zeros(2)}
    assert largest_difference(one, one) == 0
    assert largest_difference(one, {**one, "a": torch.tensor([2.0, -4.0])}) == 0.25
    with pytest.raises(ValueError, match="only one has"):
        largest_difference(one, {"a": one["a"]})


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_not_the_same(odd):
    one, other = {"a": torch.ones(2), "b": torch.ones(2)}, {"a": torch.ones(2)}
    for changed in (torch.tensor([1.0, odd]), torch.full((2,), odd)):
        assert largest_difference(one, {**other, "b": changed}) == math.inf
        assert largest_difference({**other, "b": changed}, one) == math.inf


def test_a_row_that_dies_before_its_first_turn_ends_with_what_it_said(tmp_path, monkeypatch):
    output = tmp_path / "output.txt"
    output.write_text("no such model\n")

    def dead(self, row, job, **options):
        process = subprocess.Popen([sys.executable, "-c", ""], text=True, **options)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        return process, output

    monkeypatch.setattr(Processes, "_start", dead)
    with (
        pytest.raises(RuntimeError, match="no such model"),
        Processes(tmp_path).taking_turns("adamw", job(tmp_path)) as row,
    ):
        row.step()


def test_a_meter_knows_no_growth_if_the_peak_cannot_begin_again(tmp_path, monkeypatch):
    meter = Meter(job(tmp_path))

    def refused(*_, **__):
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refused)
    meter.begins()
    meter.ends()
    assert meter.memory["rss_growth_bytes"] is None


def test_an_error_is_one_line_without_folders():
    advice = "\x1b[1mload failed\x1b[0m. Do so.\n\tUnsupported global: GLOBAL a.B was not allowed"
    assert in_short(RuntimeError(advice)) == (
        "RuntimeError: load failed. Unsupported global: GLOBAL a.B"
    )
    assert in_short(OSError(f"no {ROOT}/file\nmore")) == "OSError: no /file"


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("row", ROWS)
def test_each_row_trains(row, tmp_path, monkeypatch):
    for package in ROWS[row].packages:
        if find_spec(package.split("==")[0].replace("-", "_")) is None:
            pytest.skip(f"{package} is not installed here")
    monkeypatch.chdir(ROOT)
    file = tmp_path / "job.json"
    settings = job(tmp_path, rate=ROWS[row].rates[0])
    settings.write(file)
    run_python(["benchmarks/peers.py", "--one", row, "--job", str(file)])
    found = json.loads(settings.result.read_text())
    assert "error" not in found
    assert math.isfinite(found["held_out_loss"])
    assert row not in TRAINED or len(found["step_seconds"]) == 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="counting memory needs a C compiler")
def test_the_script_compares_two_rows(tmp_path):
    tiny = ["--model", "tiny", "--steps", "2", "--batch-size", "2", "--max-length", "128"]
    tiny += ["--val-examples", "4", "--speed-steps", "2", "--rounds", "1", "--resume-steps", "2"]
    tiny += ["--threads", "1", "--output", str(tmp_path)]
    both = ["--only", "hf_adamw", "adamw"]
    for part in ([*both, "--rates", "1e-4"], ["--resume", "--only", "adamw"], ["--speed", *both]):
        command = [sys.executable, "benchmarks/peers.py", *tiny, *part]
        subprocess.run(command, cwd=ROOT, check=True)
    records = [json.loads(line) for line in (tmp_path / "peers.jsonl").read_text().splitlines()]
    assert [record["kind"] for record in records] == ["train"] * 2 + ["resume", "speed"]
    theirs, ours = (summary(records, row) for row in ("hf_adamw", "adamw"))
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)
    assert ours.resumes == SAME
    assert ours.peak_bytes < theirs.peak_bytes
    assert {"held-out loss", "peak", "tokens/s"} <= words(*records).keys()
    assert "| lit_ft, adamw |" in (tmp_path / "peers.md").read_text()
