"""The columns of the table, which all forms of the report share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from lit_ft.comparison.comparison import Comparison, Row
from lit_ft.comparison.methods import Trial
from lit_ft.comparison.scores import metrics_of_tasks
from lit_ft.comparison.spread import Spread
from lit_ft.terminal.console import format_bytes

NOTHING = "-"
"""What a cell without a figure shows."""


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        heading: The words above it.
        cell: The function that returns the text of a row.
        meaning: What its figures are, in a sentence.
        is_text: Whether it holds words, not figures.
        in_terminal: Whether the table in the terminal has it, too.
    """

    heading: str
    cell: Callable[[Row], str]
    meaning: str
    is_text: bool = False
    in_terminal: bool = True


def columns_of(comparison: Comparison) -> list[Column]:
    """Return the columns of a table; those that no row fills are left out."""
    filled = [
        column
        for column in _COLUMNS
        if column.heading in _ALWAYS or any(column.cell(row) != NOTHING for row in comparison.rows)
    ]
    place = next(n for n, column in enumerate(filled) if column.heading == _AFTER_SCORES)
    return [*filled[:place], *_scores(comparison), *filled[place:]]


def learning_rate_of(trial: Trial) -> str:
    """Return the learning rate of a trial as text."""
    rate = trial.learning_rate
    return NOTHING if rate is None else f"{rate:g}" if isinstance(rate, float) else str(rate)


def forgetting_of(trial: Trial) -> float | None:
    """Return how much the runs have forgotten, a number or the `value` of an object."""
    found = trial.mean("forgetting")
    return trial.mean("forgetting", "value") if found is None else found


def number(value: float | None, form: str) -> str:
    """Return a figure as text.

    Args:
        value: The figure; None if there is none.
        form: The form of the text, such as ".4f".
    """
    return NOTHING if value is None else format(value, form)


def size(value: float | None) -> str:
    """Return a number of bytes as text."""
    return NOTHING if value is None else format_bytes(value)


def with_spread(found: Spread | None, form: str) -> str:
    """Return a mean and, if there are several values, their standard deviation."""
    if found is None:
        return NOTHING
    mean = format(found.mean, form)
    return mean if found.deviation is None else f"{mean} ± {format(found.deviation, form)}"


def verdict(row: Row) -> str:
    """Return whether the difference between a row and the best one is within noise."""
    if row.is_best:
        return "best"
    if row.difference is None:
        return NOTHING
    return "within noise" if row.difference.is_within_noise else f"{row.difference.mean:+.4f}"


def _scores(comparison: Comparison) -> Iterator[Column]:
    """Yield a column for each task that rows are scored on, with its first metric."""
    for task, metrics in metrics_of_tasks(comparison.compared).items():
        for metric in metrics[:1]:
            yield Column(
                f"{task} {metric}",
                partial(_score, task, metric),
                "Scored by lm-eval after training. Mean over the seeds ± standard deviation.",
            )


def _score(task: str, metric: str, row: Row) -> str:
    return with_spread(row.trial.spread_of("scores", task, metric), ".3f")


def _rate(row: Row) -> str:
    tried = row.method.rates_tried
    rate = learning_rate_of(row.trial)
    return f"{rate} (best of {tried})" if tried > 1 else rate


def _runs(row: Row) -> str:
    return str(len(row.trial.runs))


_AFTER_SCORES = "against the best"
# Without any figure too, they say so in each row.
_ALWAYS = ("row", "settings", "held-out loss", "against the best", "front")
_COLUMNS: Sequence[Column] = (
    Column("row", lambda row: str(row.number), "Rows are in the order of their held-out loss."),
    Column("settings", lambda row: row.name, "What this row does not share with all others.", True),
    Column("learning rate", _rate, "The rate with the lowest loss of those that were tried."),
    Column("runs", _runs, "The number of completed runs, one a seed.", in_terminal=False),
    Column(
        "held-out loss",
        lambda row: with_spread(row.trial.loss, ".4f"),
        "Mean over the seeds ± standard deviation.",
    ),
    Column(
        "perplexity",
        lambda row: with_spread(row.trial.spread_of("val_perplexity"), ".2f"),
        "Mean over the seeds ± standard deviation.",
        in_terminal=False,
    ),
    Column("against the best", verdict, "In loss, if it is more than noise.", True),
    Column(
        "share of fall",
        lambda row: number(row.share_of_fall, ".1%"),
        "The fall of the held-out loss during training, over that of the best row.",
        in_terminal=False,
    ),
    Column(
        "front",
        lambda row: "yes" if row.is_on_front else NOTHING,
        "No other row has less loss without more peak memory.",
        True,
    ),
    Column(
        "peak memory",
        lambda row: size(row.trial.highest("peak_bytes", "value")),
        "Measured: the highest of the runs.",
    ),
    Column(
        "planned peak",
        lambda row: size(row.trial.highest("planned_peak_bytes", "value")),
        "The memory of tensors as planned before the run.",
        in_terminal=False,
    ),
    Column(
        "optimizer state",
        lambda row: size(row.trial.highest("optimizer_state_bytes")),
        "The memory of the optimizer's state.",
        in_terminal=False,
    ),
    Column(
        "tokens/s",
        lambda row: number(row.trial.mean("tokens_per_second"), ",.0f"),
        "The speed of training alone.",
    ),
    Column(
        "s/step",
        lambda row: number(row.trial.mean("step_seconds", "median"), ".3g"),
        "The median time of an optimizer step.",
        in_terminal=False,
    ),
    Column(
        "checkpoints",
        lambda row: size(row.trial.highest("disk_bytes", "checkpoints")),
        "The size on disk.",
        in_terminal=False,
    ),
    Column(
        "export",
        lambda row: size(row.trial.highest("disk_bytes", "export")),
        "The size of the exported model on disk.",
        in_terminal=False,
    ),
    Column(
        "forgetting",
        lambda row: number(forgetting_of(row.trial), ".4f"),
        "What the model has lost on other text; lower is better.",
        in_terminal=False,
    ),
)
