"""lm-eval's results get plain names, and a user sees those that were asked for."""

from __future__ import annotations

from lit_ft.evaluation.scores import metrics_of, scores_of, stderr_of

RESULTS = {
    "results": {
        "arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 9},
        "gsm": {"match,strict": 0.2, "match_stderr,strict": "N/A", "match,loose": 1},
        "both": {"alias": "both", "acc,none": 0.4, "acc_stderr,none": 0.05},
        "bundle": {"alias": "bundle", " ": " "},
    },
    "group_subtasks": {"both": ["arc", "gsm"], "bundle": ["arc", "gsm"]},
}


def test_a_task_has_its_metrics_and_their_errors_as_far_as_they_are_known():
    assert scores_of(RESULTS, ["arc", "gsm"]) == {
        "arc": {"acc": 0.5, "acc_stderr": 0.1},
        "gsm": {"match (strict)": 0.2, "match (loose)": 1.0},
    }


def test_a_group_has_its_own_score_or_stands_for_its_members():
    assert scores_of(RESULTS, ["both"]) == {"both": {"acc": 0.4, "acc_stderr": 0.05}}
    assert list(scores_of(RESULTS, ["bundle"])) == ["arc", "gsm"]


def test_an_error_is_no_metric():
    values = {"acc": 0.5, "acc_stderr": 0.1, "acc_norm": 0.6}
    assert metrics_of(values) == ["acc", "acc_norm"]
    assert stderr_of("acc") in values
