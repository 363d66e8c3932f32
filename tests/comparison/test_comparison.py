"""What becomes a row, which rate a row shows, what is left out and what is warned of."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_ft.comparison.comparison import compare
from lit_ft.comparison.figures import lines, plain
from lit_ft.comparison.runs import Run, gather
from tests.support.summaries import GIB, made_summary, write_many, write_run


def runs(*made: dict) -> list[Run]:
    return [Run(Path(f"runs/{number}"), summary) for number, summary in enumerate(made)]


SEVERAL = runs(
    *(
        made_summary("model=tiny", f"optim={optim}", loss=loss + seed / 100, seed=seed, lr=lr)
        for optim, loss in (("adamw", 2.5), ("sgd", 2.9), ("muon", 2.5))
        for lr in (1e-3, 1e-2)
        for seed in (0, 1)
    ),
    made_summary(
        "optim=lion", loss=None, status="failed", ended="ValueError before the first step"
    ),
    made_summary("optim=adamw", loss=None),
)


def test_runs_that_differ_in_the_seed_alone_are_a_row():
    compared = compare(
        runs(
            *(made_summary("optim=adamw", loss=2 + seed, seed=seed) for seed in (0, 1, 2)),
            made_summary("optim=sgd", loss=1.0),
        )
    )
    assert [row.name for row in compared.rows] == ["optim=sgd", "optim=adamw"]
    assert [len(row.trial.runs) for row in compared.rows] == [1, 3]
    assert (compared.rows[1].trial.loss.mean, compared.rows[1].trial.loss.deviation) == (3.0, 1.0)
    assert compared.rows[1].share_of_fall == pytest.approx(0.5 / 2.5)


def test_a_loss_of_a_run_that_did_not_complete_is_no_result():
    compared = compare(
        runs(
            made_summary("optim=adamw", loss=1.0, status="interrupted"),
            made_summary("optim=sgd", loss=2.0),
        )
    )
    assert [row.trial.loss.mean for row in compared.rows] == [2.0]
    assert [one.status for one in compared.without] == ["interrupted"]


def test_the_folder_of_a_run_makes_no_difference(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / f"r{seed}", f"logs.place={tmp_path}/r{seed}/logs", seed=seed)
    [row] = compare(gather([tmp_path])[0]).rows
    assert len(row.trial.runs) == 2


def test_a_row_shows_the_learning_rate_with_the_lowest_mean_and_keeps_all():
    made = [
        made_summary("optim=adamw", loss=loss, seed=seed, lr=lr)
        for lr, losses in ((1e-4, (2.0, 3.0)), (1e-3, (2.2, 2.4)), (1e-2, (9.0, 9.0)))
        for seed, loss in enumerate(losses)
    ]
    [row] = compare(runs(*made)).rows
    assert [trial.learning_rate for trial in row.method.trials] == [1e-3, 1e-4, 1e-2]
    assert row.trial.loss.mean == pytest.approx(2.3)
    told = plain(compare(runs(*made)))
    assert [trial["learning_rate"] for trial in told["rows"][0]["trials"]] == [1e-3, 1e-4, 1e-2]
    assert [line["is_best_rate"] for line in lines(compare(runs(*made)))] == [True, False, False]


@given(st.permutations(SEVERAL))
def test_the_order_of_runs_changes_nothing(order):
    assert plain(compare(order)) == plain(compare(SEVERAL))


@given(st.lists(st.sampled_from(SEVERAL), unique_by=id))
def test_no_run_vanishes(some):
    told = plain(compare(some))
    shown = [run["folder"] for row in told["rows"] for t in row["trials"] for run in t["runs"]]
    shown += [one["folder"] for one in told["without_result"]]
    assert sorted(shown) == sorted(str(run.folder) for run in some)


def test_names_tell_rows_apart_and_leave_out_what_all_share():
    made = runs(
        made_summary("model=tiny", "optim=adamw", "data.max_length=8", loss=1.0),
        made_summary("model=tiny", "optim=adamw", "data.max_length=9", loss=2.0),
        made_summary("model=tiny", loss=3.0),
    )
    compared = compare(made)
    assert compared.shared == ["model=tiny"]
    assert [row.name for row in compared.rows] == [
        "optim=adamw data.max_length=8",
        "optim=adamw data.max_length=9",
        "no settings of its own",
    ]


def test_an_argument_that_changes_nothing_is_no_name():
    usual, given_too = made_summary("optim=adamw", loss=1.0), made_summary("optim=sgd", loss=2.0)
    for one in (usual, given_too):
        one["config"]["trainer"] = {"max_steps": 40}
    given_too["starts"][0]["arguments"].append("trainer.max_steps=40")
    assert [row.name for row in compare(runs(usual, given_too)).rows] == [
        "optim=adamw",
        "optim=sgd",
    ]


def test_settings_from_a_file_tell_rows_apart_too():
    made = [made_summary("galore.rank=4", loss=1.0), made_summary("galore.rank=8", loss=2.0)]
    for one in made:
        one["starts"] = [{"arguments": []}]
    assert [row.name for row in compare(runs(*made)).rows] == ["galore.rank=4", "galore.rank=8"]


def test_a_row_without_a_peak_of_memory_is_on_no_front():
    compared = compare(
        runs(
            made_summary("optim=a", loss=1.0, peak_bytes=None),
            made_summary("optim=b", loss=2.0),
            made_summary("optim=c", loss=3.0, peak_bytes={"value": 3 * GIB, "source": "x"}),
            made_summary("optim=d", loss=4.0, peak_bytes={"value": GIB, "source": "x"}),
        )
    )
    assert [row.is_on_front for row in compared.rows] == [False, True, False, True]


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"hardware": {"gpus": ["A card"], "cpu": "A processor"}}, "different hardware"),
        ({"steps": 80}, "different numbers of steps"),
        ({"versions": {"torch": "2.14.0", "lit_ft": "0.1.0"}}, "different versions"),
        ({"peak_bytes": {"value": 1, "source": "cuda_allocated"}}, "different kinds of memory"),
        ({"model": {"name": "another"}}, "different models"),
        ({"data": {"val": {"examples": 3}, "rows_per_step": 4}}, "read different data"),
        ({"data": {"rows_per_step": 8}}, "different rows in a step"),
        ({"lr": 5.0}, None),
        ({"tokens_per_second": 5.0}, None),
    ],
)
def test_what_runs_do_not_share_is_a_warning(other, told):
    made = runs(made_summary("optim=a", loss=1.0), made_summary("optim=b", loss=2.0, **other))
    found = compare(made).warnings
    assert (told is None) == (found == [])
    assert told is None or told in found[0]


def test_other_rows_of_data_are_a_warning():
    made = runs(made_summary("data.path=a.jsonl"), made_summary("data.path=b.jsonl", loss=2.0))
    [warning] = compare(made).warnings
    assert "different data" in warning
    assert "data.path=a.jsonl (rows 2)" in warning and "data.path=b.jsonl (rows 1)" in warning


@pytest.mark.parametrize(
    "losses, end", [((3, 2, 1), "highest"), ((1, 2, 3), "lowest"), ((2, 1, 2), None)]
)
def test_a_best_rate_at_the_edge_is_a_warning(losses, end):
    made = [made_summary(lr=lr, loss=loss) for lr, loss in zip((1, 2, 3), losses, strict=True)]
    found = compare(runs(*made)).warnings
    assert [f"is the {end} that was tried" in one for one in found] == [True] * (end is not None)


def test_different_numbers_of_rates_are_a_warning():
    made = [made_summary("optim=a", lr=lr, loss=abs(lr - 2)) for lr in (1, 2, 3)]
    made += [made_summary("optim=b")]
    [warning] = compare(runs(*made)).warnings
    assert warning.startswith("Between 1 and 3 learning rates")


def test_runs_below_a_folder_are_found_once_and_starts_are_no_runs(tmp_path):
    write_run(tmp_path / "sweep" / "0")
    write_run(tmp_path / "sweep" / "1" / ".hydra" / "starting")
    again = tmp_path / "sweep" / ".." / "sweep"
    found, damaged = gather([tmp_path, tmp_path / "sweep", tmp_path / "sweep" / "0", again])
    assert [run.folder for run in found] == [tmp_path / "sweep" / "0"]
    assert damaged == []


def test_a_damaged_summary_is_told_of_beside_the_good_ones(tmp_path):
    write_many(tmp_path, methods=2, seeds=1)
    told = plain(compare(*gather([tmp_path])))
    assert len(told["rows"]) == 2
    assert {one["status"]: one["reason"] for one in told["without_result"]} == {
        "damaged": f"{tmp_path}/broken/summary.json is damaged: Expecting property name enclosed "
        "in double quotes: line 1 column 2 (char 1). `python train.py "
        f"run_dir={tmp_path}/broken resume=auto` writes it again.",
        "out of memory": "out of memory at step 3",
        "interrupted": "it was killed, or has not ended yet",
    }


def test_entries_of_the_wrong_kind_are_as_absent(tmp_path):
    wrong = dict.fromkeys(made_summary(), ["wrong"]) | {"status": "completed", "val_loss": 2.0}
    wrong |= {"config": {"seed": {}}, "starts": [7], "history": {"val": [3, {"step": "x"}]}}
    [row] = compare(runs(wrong)).rows
    assert row.trial.runs[0].curve("val") == []
    assert row.trial.highest("peak_bytes", "value") is None
    lines(compare(runs(wrong, made_summary(loss=float("nan")))))
