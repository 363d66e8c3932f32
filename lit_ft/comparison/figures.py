"""The figures of a comparison as plain values, for other programs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lit_ft.comparison.columns import forgetting_of
from lit_ft.comparison.comparison import Comparison, Row
from lit_ft.comparison.methods import Trial
from lit_ft.comparison.noise import RULE
from lit_ft.comparison.runs import Run
from lit_ft.comparison.scores import metrics_of_tasks
from lit_ft.comparison.spread import Spread

SCHEMA_VERSION = 1


def plain(comparison: Comparison) -> dict[str, Any]:
    """Return all that a comparison says, as `report.json` has it."""
    return {
        "schema_version": SCHEMA_VERSION,
        "rule": RULE,
        "warnings": list(comparison.warnings),
        "shared_arguments": list(comparison.shared),
        "rows": [_row(row) for row in comparison.rows],
        "without_result": [
            {
                "status": one.status,
                "reason": one.reason,
                "settings": one.name,
                **({"folder": str(one.folder)} if one.run is None else _run(one.run)),
            }
            for one in comparison.without
        ],
    }


def lines(comparison: Comparison) -> list[dict[str, Any]]:
    """Return a flat line for each trial, unfinished run and damaged folder, as for a CSV file."""
    found = [line for row in comparison.rows for line in _trial_lines(row)]
    found += [
        {
            "status": one.status,
            "settings": one.name,
            "reason": one.reason,
            "folders": str(one.folder),
        }
        for one in comparison.without
    ]
    return found


def _row(row: Row) -> dict[str, Any]:
    difference = row.difference
    return {
        "row": row.number,
        "settings": row.name,
        "is_best": row.is_best,
        "difference": None
        if difference is None
        else {
            "mean": difference.mean,
            "half_width": difference.half_width,
            "pairs": difference.pairs,
            "is_within_noise": difference.is_within_noise,
        },
        "share_of_fall": row.share_of_fall,
        "is_on_front": row.is_on_front,
        "trials": [
            {
                **_figures(trial),
                "scores": _scores(trial),
                "runs": [_run(run) for run in trial.runs],
            }
            for trial in row.method.trials
        ],
    }


def _run(run: Run) -> dict[str, Any]:
    return {
        "folder": str(run.folder),
        "seed": run.seed,
        "val_loss": run.number("val_loss"),
        "arguments": run.arguments,
        "hardware": run.get("hardware"),
        "versions": run.get("versions"),
        "commit": run.get("commit"),
    }


def _figures(trial: Trial) -> dict[str, Any]:
    return {
        "learning_rate": trial.learning_rate,
        "seeds": list(trial.losses),
        **_mean_and_deviation("val_loss", trial.loss),
        **_mean_and_deviation("val_perplexity", trial.spread_of("val_perplexity")),
        "initial_val_loss": trial.mean("initial_val_loss"),
        "peak_bytes": trial.highest("peak_bytes", "value"),
        "planned_peak_bytes": trial.highest("planned_peak_bytes", "value"),
        "optimizer_state_bytes": trial.highest("optimizer_state_bytes"),
        "tokens_per_second": trial.mean("tokens_per_second"),
        "median_step_seconds": trial.mean("step_seconds", "median"),
        "checkpoint_disk_bytes": trial.highest("disk_bytes", "checkpoints"),
        "export_disk_bytes": trial.highest("disk_bytes", "export"),
        "forgetting": forgetting_of(trial),
    }


def _scores(trial: Trial) -> dict[str, dict[str, float | None]]:
    """Return the mean and the deviation of each metric, keyed by task."""
    return {
        task: {
            name: value
            for metric in metrics
            for name, value in _mean_and_deviation(
                metric, trial.spread_of("scores", task, metric)
            ).items()
        }
        for task, metrics in metrics_of_tasks(trial.runs).items()
    }


def _mean_and_deviation(name: str, found: Spread | None) -> dict[str, float | None]:
    return {
        name: None if found is None else found.mean,
        f"{name}_deviation": None if found is None else found.deviation,
    }


def _trial_lines(row: Row) -> Iterator[dict[str, Any]]:
    for trial in row.method.trials:
        is_chosen = trial is row.trial
        figures = _figures(trial)
        yield {
            "status": "completed",
            "row": row.number,
            "settings": row.name,
            "is_best_rate": is_chosen,
            **figures,
            **{
                f"{task} {name}": value
                for task, values in _scores(trial).items()
                for name, value in values.items()
            },
            "seeds": " ".join(map(str, figures["seeds"])),
            "is_within_noise": row.difference.is_within_noise
            if is_chosen and row.difference is not None
            else None,
            "share_of_fall": row.share_of_fall if is_chosen else None,
            "is_on_front": row.is_on_front if is_chosen else None,
            "folders": " ".join(str(run.folder) for run in trial.runs),
        }
