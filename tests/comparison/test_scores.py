"""Scores of tasks in the table of a comparison, and in its files."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from lit_ft.compare import main
from lit_ft.comparison.comparison import compare
from lit_ft.comparison.runs import Run
from lit_ft.comparison.trainable import trainable
from lit_ft.storage.json_file import read_json
from tests.support.summaries import made_summary, write_run


def scores(acc: float) -> dict:
    return {"arc": {"acc": acc, "acc_stderr": 0.1, "acc_norm": 2 * acc}, "gsm": {"match": acc}}


@pytest.fixture
def report(tmp_path):
    """Two seeds of one method are scored, and another method is not."""
    for seed, acc in enumerate((0.25, 0.5)):
        write_run(tmp_path / str(seed), "optim=adamw", seed=seed, loss=2.0, scores=scores(acc))
    write_run(tmp_path / "other", "optim=sgd", loss=3.0)
    write_run(tmp_path / "null", "optim=muon", loss=4.0, scores=None)
    main([str(tmp_path)])
    return tmp_path


def test_each_task_has_a_column_with_its_first_metric(report):
    text = (report / "report.md").read_text()
    [heading] = [line for line in text.splitlines() if "held-out loss" in line]
    cells = [cell.strip() for cell in heading.split("|")]
    place = cells.index("arc acc")
    assert cells[place - 1 : place + 3] == [
        "perplexity",
        "arc acc",
        "gsm match",
        "against the best",
    ]
    rows = [line.split("|") for line in text.splitlines() if line.startswith("|")]
    assert [row[place].strip() for row in rows[2:]] == ["0.375 ± 0.177", "-", "-"]
    assert "arc acc" in (report / "report.html").read_text()


def test_the_table_in_the_terminal_has_them_too(report, capsys):
    main([str(report)])
    words = capsys.readouterr().out.split()
    assert words.count("0.375") == words.count("0.177") == 2


def test_the_files_for_programs_have_all_metrics(report):
    best, *others = read_json(report / "report.json")["rows"]
    assert best["trials"][0]["scores"] == {
        "arc": {
            "acc": 0.375,
            "acc_deviation": pytest.approx(0.1768, abs=1e-4),
            "acc_norm": 0.75,
            "acc_norm_deviation": pytest.approx(0.3536, abs=1e-4),
        },
        "gsm": {"match": 0.375, "match_deviation": pytest.approx(0.1768, abs=1e-4)},
    }
    assert [row["trials"][0]["scores"] for row in others] == [{}, {}]
    lines = list(csv.DictReader(io.StringIO((report / "report.csv").read_text())))
    assert [line["arc acc"] for line in lines] == ["0.375", "", ""]
    assert lines[0]["arc acc_norm"] == "0.75" and float(lines[0]["gsm match_deviation"]) > 0.17


@pytest.mark.parametrize("damaged", [3, "text", ["arc"], {"arc": 0.5}, {"arc": {"acc": "high"}}])
def test_scores_of_another_form_are_no_figures(damaged, tmp_path):
    write_run(tmp_path / "0", scores=damaged)
    main([str(tmp_path)])
    assert read_json(tmp_path / "report.json")["rows"]


def test_how_runs_are_scored_makes_no_rows_but_a_warning_if_it_differs():
    first = ("optim=adamw", "eval.tasks=[arc]", "eval.limit=4")
    made = [
        made_summary(*first, seed=0, loss=2.0, scores={"arc": {"acc": 1.0}}),
        made_summary("optim=adamw", seed=1, loss=2.0, scores={"arc": {"acc": 0.5}}),
        made_summary("optim=adamw", "eval.batch_size=2", seed=2, loss=2.0),
        made_summary("optim=sgd", loss=3.0, scores={"arc": {"acc": 0.5}}),
    ]
    found = compare([Run(Path(str(number)), summary) for number, summary in enumerate(made)])
    assert [(row.name, len(row.trial.runs)) for row in found.rows] == [
        ("optim=adamw", 3),
        ("optim=sgd", 1),
    ]
    [warning] = found.warnings
    assert warning == (
        "The runs are scored on arc with different settings, so these scores cannot be compared: "
        "eval.limit=4 eval.num_fewshot=null eval.apply_chat_template=null (rows 1); "
        "eval.limit=null eval.num_fewshot=null eval.apply_chat_template=null (rows 1, 2)."
    )


@pytest.mark.parametrize(
    "setting", ["eval.limit=4", "eval.num_fewshot=2", "eval.tasks=[docstring_choice]"]
)
def test_a_run_that_is_scored_in_another_way_is_another_run(setting, tmp_path):
    one, other = (
        trainable(["model=tiny", *own]).cell([], [], tmp_path) for own in ((), (setting,))
    )
    assert one.folder != other.folder
