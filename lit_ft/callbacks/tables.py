"""Print a table of what will be trained, and a box with the results."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from torch import nn
from torch.optim import Optimizer

from lit_ft.callbacks._support.trainer import network_of, source_name
from lit_ft.compat.protocols import CountsRows, ReportsData
from lit_ft.distributed.ranks import data_parallel_rank
from lit_ft.measure import estimate_state_bytes
from lit_ft.measure.model_size import model_size, num_weights


class StartTable(Callback):
    """Print the model, the optimizer's groups and the data once, before the first step.

    The bytes of optimizer state are an estimate (`lit_ft.measure.estimate_state_bytes`). Under a
    sharded strategy, the bytes of weights and state are those of rank 0. What is shown of the data
    comes from the datamodule's `reports`, if it has this attribute: a mapping from the name of a
    split to anything that prints.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> trainer = L.Trainer(
        ...     callbacks=[StartTable()], max_steps=1, accelerator="cpu", barebones=True
        ... )
        >>> trainer.fit(BoringModel())  # doctest: +ELLIPSIS, +NORMALIZE_WHITESPACE
        model
         name        BoringModel
         parameters  66
         trainable   66 (100.00%)
         weights     0.000 GiB
         dtype       float32
        SGD
        ...
    """

    def __init__(self) -> None:
        self._printed = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that nothing has been printed in this fit."""
        self._printed = False

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print before the sanity check, when the optimizer already exists."""
        self._print(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print before training, unless it was done before the sanity check."""
        if not self._printed:
            self._print(trainer, pl_module)

    @rank_zero_only
    def _print(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._printed = True
        tables = [model_table(network_of(pl_module), source_name(pl_module))]
        tables += [optimizer_table(optimizer) for optimizer in trainer.optimizers]
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(datamodule, ReportsData) and isinstance(datamodule.reports, Mapping):
            data = {name: str(report) for name, report in datamodule.reports.items()}
            tables.append(_pairs("data", {**data, **_extent(trainer, datamodule)}))
        Console().print(Group(*tables))


def model_table(model: nn.Module, name: str | None = None) -> Table:
    """Return a table of the model's name, numbers of parameters, bytes and dtypes.

    Tied parameters count once. A packed parameter counts as the number of weights that it holds.

    Args:
        model: The model to describe.
        name: The name to show; None shows the model's own name, or else the name of its class.
    """
    size = model_size(model)
    share = size.trainable_parameters / max(size.parameters, 1)
    rows = {
        "name": name or getattr(model, "name_or_path", "") or type(model).__name__,
        "parameters": f"{size.parameters:,}",
        "trainable": f"{size.trainable_parameters:,} ({share:.2%})",
        "through": f"{size.subspace_parameters:,} parameters in subspaces",
        "weights": _gib(size.weight_bytes),
        "dtype": ", ".join(
            sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
        ),
    }
    if not size.subspace_parameters:
        del rows["through"]
    return _pairs("model", rows)


def optimizer_table(optimizer: Optimizer) -> Table:
    """Return a table with one row for each parameter group."""
    table = Table(title=type(optimizer).__name__, title_justify="left")
    table.add_column("group")
    for heading in ("tensors", "parameters", "lr", "weight decay", "state (estimate)"):
        table.add_column(heading, justify="right")
    groups = zip(optimizer.param_groups, estimate_state_bytes(optimizer), strict=True)
    for index, (group, state) in enumerate(groups):
        lr = group.get("initial_lr", group.get("lr"))  # the peak, under a schedule
        table.add_row(
            escape(str(group.get("name", index))),
            f"{len(group['params']):,}",
            f"{sum(map(num_weights, group['params'])):,}",
            "its own" if lr is None else f"{float(lr):.3g}",
            f"{group.get('weight_decay', 0.0):.3g}",
            "?" if state is None else _gib(state),
        )
    return table


def final_panel(summary: Mapping[str, Any]) -> Panel:
    """Return the box to show at the end of a run, made from the contents of its summary.json.

    Args:
        summary: The contents of summary.json, in which any entry may be null or absent. It may also
            have a list `samples` of `{"step", "prompt", "text"}`, from which the box shows the
            first and the last answer to the first prompt.
    """
    peak = summary.get("peak_bytes") or {}
    steps = summary.get("step_seconds") or {}
    by_source = summary.get("val_loss_by_source") or {}
    rows = {
        "val loss": _before_after(summary.get("initial_val_loss"), summary.get("val_loss")),
        **{f"  of {name}": _number(loss, ".4f") for name, loss in by_source.items()},
        "val perplexity": _number(summary.get("val_perplexity"), ".2f"),
        "train loss": _number(summary.get("train_loss"), ".4f"),
        "steps": _number(summary.get("steps"), ","),
        "ended": summary.get("ended"),
        "tokens/s": _number(summary.get("tokens_per_second"), ",.0f"),
        "step": _number(steps.get("median"), ".3f", " s (median)"),
        "peak memory": None
        if peak.get("value") is None
        else f"{_gib(peak['value'])} ({peak.get('source')})",
        "optimizer state": None
        if summary.get("optimizer_state_bytes") is None
        else _gib(summary["optimizer_state_bytes"]),
        "checkpoint": summary.get("checkpoint_path"),
        "model": summary.get("export_path"),
        "error": _error(summary.get("error")),
        **_samples(summary.get("samples") or []),
    }
    status = summary.get("status") or "finished"
    style = "green" if status == "completed" else "red"
    shown = {name: str(value) for name, value in rows.items() if value is not None}
    return Panel(_pairs(None, shown), title=escape(str(status)), border_style=style, expand=False)


def _extent(trainer: Trainer, datamodule: Any) -> dict[str, str]:
    """Return a row that says how often the run goes through the data; empty if it is unknown."""
    rows = datamodule.batch_size if isinstance(datamodule, CountsRows) else None
    steps, batches = trainer.max_steps, trainer.num_training_batches
    if rows is None:
        return {}
    if steps < 0:
        epochs = trainer.max_epochs
        return {} if epochs is None or epochs < 0 else {"this run": f"{epochs:,} times all rows"}
    rows *= trainer.accumulate_grad_batches * data_parallel_rank(trainer)[1]
    extent = f"{steps:,} steps of {rows:,} rows"
    if 0 < batches < math.inf:
        extent += f", {steps * trainer.accumulate_grad_batches / batches:.3g} times all rows"
    return {"this run": extent}


def _pairs(title: str | None, rows: Mapping[str, str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(escape(name), escape(value))
    return table


def _before_after(before: float | None, after: float | None) -> str | None:
    if before is None or after is None:
        return _number(after, ".4f")
    return f"{before:.4f} → {after:.4f}"


def _number(value: float | None, form: str, unit: str = "") -> str | None:
    return None if value is None else f"{value:{form}}{unit}"


def _error(error: Any) -> str | None:
    """Return summary.json's error as text; it may be a mapping with `type` and `message`."""
    if isinstance(error, Mapping):
        return f"{error.get('type')}: {error.get('message')}"
    return None if error is None else str(error)


def _samples(samples: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    same = list(samples)
    same = [one for one in same if one["prompt"] == same[0]["prompt"]]
    if not same:
        return {}
    rows = {"prompt": same[0]["prompt"], "answer before": same[0]["text"]}
    return rows if len(same) == 1 else {**rows, "answer after": same[-1]["text"]}


def _gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.3f} GiB"
