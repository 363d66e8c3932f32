"""The box at the end of a run, as plain text, and the commands below it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from rich.console import Console

from lit_ft.run.end_panel import end_panel, next_commands, print_end
from lit_ft.storage.json_file import write_json


def text_of(renderable) -> str:
    console = Console(width=200, no_color=True)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


SUMMARY = {
    "status": "completed",
    "steps": 1200,
    "initial_val_loss": 3.291,
    "val_loss": 2.7,
    "val_perplexity": 14.88,
    "train_loss": 2.5,
    "tokens_per_second": 1234.5,
    "step_seconds": {"median": 0.25, "p95": 0.3, "max": 1.0},
    "peak_bytes": {"value": 3 * 2**30, "source": "process_rss"},
    "optimizer_state_bytes": 2**30,
    "checkpoint_path": "runs/r1/checkpoints/last.ckpt",
    "export_path": "runs/r1/model",
    "seconds": {"total": 3725.4, "load": 12.0, "train": 3600.0},
    "error": None,
}


def test_the_box_shows_what_came_of_the_run(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    write_json(tmp_path / "checkpoints" / "best.json", {"val_loss": 2.6, "step": 900})
    text = text_of(end_panel(SUMMARY, tmp_path))
    for shown in (
        "completed",
        "3.2910 → 2.7000",
        "14.88",
        "1,234",
        "3.00 GiB (process_rss)",
        "runs/r1/checkpoints/last.ckpt",
        "runs/r1/model",
        "1:02:05 (1:00:00 training steps, 0:12 loading)",
        "val_loss 2.6000 at step 900",
    ):
        assert shown in text
    assert max(len(line) for line in text.splitlines() if line[0] in "╭│╰") <= 100


def test_the_box_shows_the_first_metric_of_each_task(tmp_path):
    scores = {
        "arc_easy": {"acc": 0.5125, "acc_stderr": 0.01, "acc_norm": 0.6},
        "gsm8k": {"match (strict)": 0.25},
    }
    text = text_of(end_panel(SUMMARY | {"scores": scores}, tmp_path))
    shown = [" ".join(line.strip("│ ").split()) for line in text.splitlines()]
    assert "arc_easy acc 0.512 ± 0.010 (standard error)" in shown
    assert "gsm8k match (strict) 0.250" in shown
    assert "acc_norm" not in text


def test_a_validation_alone_has_one_loss(tmp_path):
    summary = SUMMARY | {"steps": 0, "initial_val_loss": 3.291, "val_loss": 3.291}
    text = text_of(end_panel(summary, tmp_path))
    assert "validated" in text and "3.2910" in text and "→" not in text


def test_a_total_of_the_last_start_is_told_from_the_steps_of_all(tmp_path):
    summary = SUMMARY | {"seconds": {"total": 3.0, "load": 2.0, "train": 11.0}, "starts": [{}, {}]}
    text = text_of(end_panel(summary, tmp_path))
    assert "0:03 (0:11 training steps of all starts, 0:02 loading)" in text


@pytest.mark.parametrize(
    ("source", "planned"), [("process_rss", "3.00 GiB to 4.00 GiB"), ("cuda_allocated", "2.00 GiB")]
)
def test_the_box_shows_the_planned_peak_of_what_was_measured(source, planned, tmp_path):
    plan = {"value": 2 * 2**30, "outside_low": 2**30, "outside_high": 2 * 2**30}
    summary = {"peak_bytes": {"value": 3 * 2**30, "source": source}, "planned_peak_bytes": plan}
    text = text_of(end_panel(SUMMARY | summary, tmp_path))
    assert f"3.00 GiB ({source}), planned {planned} " in text


def test_the_box_shows_the_first_prompt_before_and_after(tmp_path):
    samples = [
        {"step": 0, "prompt": "p", "text": "[bold]before"},
        {"step": 0, "prompt": "q", "text": "other"},
        {"step": 9, "prompt": "p", "text": "after"},
        {"step": 9, "prompt": "q", "text": "other"},
    ]
    text = text_of(end_panel({**SUMMARY, "samples": samples}, tmp_path))
    assert "[bold]before" in text
    assert "after" in text
    assert "other" not in text


def test_an_answer_from_the_middle_of_training_is_not_called_the_one_before(tmp_path):
    samples = [{"step": step, "prompt": "p", "text": "a"} for step in (1200, 2400)]
    text = text_of(end_panel({**SUMMARY, "samples": samples}, tmp_path))
    assert "answer at step 1,200" in text
    assert "answer before" not in text


def test_the_box_shows_no_nulls(tmp_path):
    assert "None" not in text_of(end_panel({**dict.fromkeys(SUMMARY), "steps": 0}, tmp_path))
    assert text_of(end_panel({}, tmp_path))


def test_the_size_on_disk_is_that_of_the_files(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(bytes(3 << 20))
    (tmp_path / "checkpoints" / "last-1.ckpt").write_bytes(bytes(2 << 20))
    os.link(tmp_path / "checkpoints" / "last.ckpt", tmp_path / "checkpoints" / "best.ckpt")
    path = str(tmp_path / "checkpoints" / "last.ckpt")
    text = "".join(text_of(end_panel({"checkpoint_path": path}, tmp_path)).split())
    assert "(5MiBincheckpoints/)" in text.replace("│", "")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ["chat", "train on", "export"]),
        ({"export_path": None}, ["train on", "export"]),
        ({"status": "interrupted", "steps": 7}, ["go on", "export"]),
        ({"status": "interrupted", "steps": 0, "checkpoint_path": None}, []),
        ({"steps": 0}, []),  # it has validated only
        ({"config": {"checkpoint": {"save_optimizer": False}}}, ["chat", "export"]),
        ({"config": {"adapter": {"r": 8}}}, ["chat", "train on", "export"]),
        (
            {"config": {"adapter": {"r": 8}, "callbacks": {"export": {"merge": False}}}},
            ["train on", "export"],
        ),
    ],
)
def test_the_next_commands_are_those_that_work(tmp_path, changes, expected):
    lines = next_commands({**SUMMARY, **changes}, tmp_path / "my run")
    assert [line.split("  ")[1] for line in lines] == expected
    assert all(f"'{tmp_path}/my run'" in line for line in lines)


def test_the_best_weights_are_offered_for_export_if_the_last_ones_are_others(tmp_path):
    last, best = tmp_path / "checkpoints" / "last.ckpt", tmp_path / "checkpoints" / "best.ckpt"
    last.parent.mkdir()
    last.touch()
    summary = {**SUMMARY, "checkpoint_path": str(last)}
    os.link(last, best)
    assert "--checkpoint best" not in next_commands(summary, tmp_path)[-1]
    best.unlink()
    best.touch()
    assert "--checkpoint best" in next_commands(summary, tmp_path)[-1]


def test_a_narrow_terminal_cuts_no_command(capsys, monkeypatch):
    one = Console(width=60)
    monkeypatch.setattr("lit_ft.run.end_panel.console", lambda: one)
    run_dir = Path("runs/2026-11-24_10-12-04")
    print_end(SUMMARY, run_dir)
    printed = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in printed if line[0] in "╭│╰") == 60
    assert printed[-3:] == next_commands(SUMMARY, run_dir)
    assert max(map(len, printed)) > 60


def test_a_run_of_epochs_goes_on_by_epochs(tmp_path):
    config = {"trainer": {"max_steps": -1, "max_epochs": 2}}
    told = "\n".join(next_commands({**SUMMARY, "config": config}, tmp_path))
    assert "resume=auto trainer.max_epochs=4" in told


def test_an_answer_does_not_steer_the_terminal(tmp_path):
    samples = [{"step": 0, "prompt": "p", "text": "\x1b[2J\x07gone"}]
    text = text_of(end_panel({**SUMMARY, "samples": samples}, tmp_path))
    assert r"\x1b[2J\x07gone" in text
    assert "\x1b" not in text
