"""What the summary of a run means for Optuna, and how later runs are ended against earlier ones."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_ft.comparison.runs import loss_of
from lit_ft.run.trial import environment_of_trial, study_in

if TYPE_CHECKING:
    from optuna.trial import TrialState

Summary = Mapping[str, Any]


def fails_before_training(summary: Summary) -> bool:
    """Whether a run failed before its first step, for a reason that memory does not give."""
    return summary["status"] == "failed" and not summary.get("steps")


def validations_of(summary: Summary) -> list[float]:
    """Return the validation losses during training, in their order."""
    history = summary.get("history") or {}
    found = [point["val_loss"] for point in history.get("val", []) if point["step"] > 0]
    return [loss for loss in found if loss is not None]


def state_of(summary: Summary) -> TrialState:
    """Return the state of the trial that a run was."""
    from optuna.trial import TrialState

    if loss_of(summary) is not None:
        return TrialState.COMPLETE
    return TrialState.PRUNED if summary["status"] == "pruned" else TrialState.FAIL


@contextmanager
def pruned_against(earlier: Sequence[Summary]) -> Iterator[Mapping[str, str]]:
    """Give the variables with which a run ends early if it is worse than earlier runs.

    The study lives as long as the block: what has been decided is in the summaries.

    Args:
        earlier: The summaries of the earlier runs.
    """
    if not earlier:
        yield {}
        return
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "study"
        study = study_in(journal, create=True)
        for summary in earlier:
            trial = study.ask()
            for number, loss in enumerate(validations_of(summary), 1):
                trial.report(loss, number)
                trial.should_prune()  # the pruner remembers those that it was asked about
            study.tell(trial, state=state_of(summary), values=loss_of(summary))
        yield environment_of_trial(journal)
