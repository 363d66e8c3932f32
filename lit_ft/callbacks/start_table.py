"""Print a table of what will be trained, and how."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from torch import nn
from torch.optim import Optimizer

from lit_ft.callbacks._support.disk import free_bytes, num_states, state_bytes
from lit_ft.callbacks._support.trainer import find_callback, network_of, source_name, total_steps
from lit_ft.callbacks.blocks import BlockUpdate
from lit_ft.callbacks.checkpoint import BestCheckpoint, LastCheckpoint
from lit_ft.callbacks.export import ExportHF
from lit_ft.callbacks.galore import GaLore
from lit_ft.callbacks.layerwise import LayerwiseUpdate
from lit_ft.compat.protocols import CountsRows, ReportsData
from lit_ft.distributed.ranks import data_parallel_rank
from lit_ft.measure import estimate_state_bytes
from lit_ft.measure.model_size import model_size, num_weights
from lit_ft.optim.schedules import WarmupSchedule
from lit_ft.subspace import subspace_layers
from lit_ft.terminal.console import console, format_bytes, format_count
from lit_ft.terminal.pairs import pairs


class StartTable(Callback):
    """Print the model, the method, the optimizer's groups and the data, before the first step.

    The bytes of optimizer state are an estimate (`lit_ft.measure.estimate_state_bytes`). Under a
    sharded strategy, the bytes of weights and state are those of rank 0. The bytes on disk are what
    `LastCheckpoint`, `BestCheckpoint` and `ExportHF` will write at most; if less than that is free,
    a warning says so. What is shown of the data
    comes from the datamodule's `reports`, if it has this attribute: a mapping from the name of a
    split to anything that prints.

    Args:
        facts: Further facts to show at the top, such as `{"recipe": "galore_subspace"}`, keyed by
            what they are about.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> trainer = L.Trainer(
        ...     callbacks=[StartTable()], max_steps=1, accelerator="cpu", barebones=True
        ... )
        >>> trainer.fit(BoringModel())  # doctest: +ELLIPSIS, +NORMALIZE_WHITESPACE
        model      BoringModel, 66 parameters, all trained, float32, 264 B
        device     CPU, 32-true
        update     after the backward pass
        optimizer  SGD
        ...
    """

    def __init__(self, facts: Mapping[str, str] | None = None) -> None:
        self.facts = dict(facts or {})
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

    def _print(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._printed = True
        self._print_on_first_rank(trainer, pl_module, total_steps(trainer))

    @rank_zero_only
    def _print_on_first_rank(
        self, trainer: Trainer, pl_module: LightningModule, steps: float
    ) -> None:
        rows = {
            **self.facts,
            "model": described_model(network_of(pl_module), source_name(pl_module)),
            "device": f"{_devices(trainer)}, {trainer.precision}",
            **_method(trainer, pl_module, steps),
            **_schedule(pl_module, steps),
            "optimizer": ", ".join(type(one).__name__ for one in trainer.optimizers),
        }
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        data: dict[str, str] = {}
        if isinstance(datamodule, ReportsData) and isinstance(datamodule.reports, Mapping):
            data = {name: str(report) for name, report in datamodule.reports.items()}
        with _as_in_a_step(trainer, pl_module):
            tables = [pairs(rows), *map(optimizer_table, trainer.optimizers)]
            disk = _disk(trainer, pl_module)
        tables.append(pairs({**data, **_extent(trainer, datamodule, steps), **disk}))
        console().print(Group(*tables))


def described_model(model: nn.Module, name: str | None = None) -> str:
    """Return the model's name, number of parameters, share that is trained, dtypes and size.

    Tied parameters count once. A packed parameter counts as the number of weights that it holds.

    Args:
        model: The model to describe.
        name: The name to show; None shows the model's own name, or else the name of its class.
    """
    size = model_size(model)
    share = size.trainable_parameters / max(size.parameters, 1)
    trained = f"{size.trainable_parameters:,} trained ({share:.2%})"
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    return ", ".join(
        [
            name or getattr(model, "name_or_path", "") or type(model).__name__,
            f"{size.parameters:,} parameters",
            "all trained" if size.trainable_parameters == size.parameters else trained,
            *sorted(dtypes),
            format_bytes(size.weight_bytes),
        ]
    )


def optimizer_table(optimizer: Optimizer) -> Table:
    """Return a table with one row for each parameter group."""
    table = Table(box=None, padding=(0, 2, 0, 1), header_style="dim")
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
            "?" if state is None else format_bytes(state),
        )
    return table


def _devices(trainer: Trainer) -> str:
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    return name if trainer.world_size == 1 else f"{trainer.world_size} × {name}"


def _as_in_a_step(trainer: Trainer, pl_module: LightningModule) -> AbstractContextManager[None]:
    """Let only what has optimizer state at the same time require a gradient inside the block."""
    blocks = find_callback(trainer, BlockUpdate)
    return nullcontext() if blocks is None else blocks.largest_active(pl_module)


def _method(trainer: Trainer, pl_module: LightningModule, steps: float) -> dict[str, str]:
    """Return how the weights change: in subspaces, through an adapter, layer by layer, in turns."""
    rows = {}
    galore = find_callback(trainer, GaLore)
    layers = subspace_layers(network_of(pl_module)).values()
    if galore is not None and layers:
        small = sum(layer.delta.numel() for layer in layers)
        whole = sum(layer.weight.numel() for layer in layers)
        rows["GaLore"] = (
            f"rank {galore.rank}, {whole:,} weights of {format_count(len(layers), 'layer')} "
            f"through {small:,} parameters ({small / whole:.1%}), {galore.projector_in_force}"
        )
    for config in getattr(network_of(pl_module), "peft_config", {}).values():
        targets = sorted(config.target_modules or ())
        kind = getattr(config.peft_type, "value", config.peft_type)
        rows["adapter"] = f"{kind}, rank {getattr(config, 'r', '?')}, on {', '.join(targets)}"
    layerwise = find_callback(trainer, LayerwiseUpdate) is not None
    rows["update"] = "layerwise, in the backward pass" if layerwise else "after the backward pass"
    blocks = find_callback(trainer, BlockUpdate)
    if blocks is not None:
        told = blocks.described(pl_module, steps)
        rows["update"] = f"{told}; layerwise" if layerwise else told
    return rows


def _schedule(pl_module: LightningModule, steps: float) -> dict[str, str]:
    schedule = getattr(pl_module, "schedule", None)
    if not isinstance(schedule, WarmupSchedule) or not math.isfinite(steps):
        return {}
    warmup = schedule.num_warmup_steps(int(steps))
    return {
        "schedule": f"{schedule.name}, {warmup:,} of {format_count(int(steps), 'step')} to warm up"
    }


def _extent(trainer: Trainer, datamodule: Any, steps: float) -> dict[str, str]:
    """Return a row that says how much of the data the run reads; empty if it is unknown."""
    if not isinstance(datamodule, CountsRows):
        return {}
    shares = data_parallel_rank(trainer)[1]
    a_step = datamodule.batch_size * trainer.accumulate_grad_batches * shares
    parts = [format_count(datamodule.batch_size, "row")]
    if trainer.accumulate_grad_batches > 1:
        parts.insert(0, f"{trainer.accumulate_grad_batches:,} micro-batches")
    if shares > 1:
        parts.insert(0, f"{shares:,} ranks")
    if not math.isfinite(steps):
        return {"this run": f"{' × '.join(parts)} = {format_count(a_step, 'row')} a step"}
    parts = [format_count(int(steps), "step"), *parts]
    extent = f"{' × '.join(parts)} = {format_count(int(steps) * a_step, 'row')}"
    if math.isfinite(batches := trainer.num_training_batches) and batches:
        times = steps * trainer.accumulate_grad_batches / batches
        once = f", {times:.2%} of all" if times < 1 else ", each row once"
        extent += once if times <= 1 else f", {times:.3g} times all"
    return {"this run": extent}


def _disk(trainer: Trainer, pl_module: LightningModule) -> dict[str, str]:
    """Return a row with what the run will take on disk; warn if there is not so much room."""
    last, best = find_callback(trainer, LastCheckpoint), find_callback(trainer, BestCheckpoint)
    export = find_callback(trainer, ExportHF)
    if last is None and best is None and export is None:
        return {}
    size = state_bytes(trainer, pl_module)
    parts: dict[str, int] = {}
    folder = "."
    if export is not None:
        # Without a merge, an adapter is exported as it is saved.
        parts["export"] = size.export if export.merge else size.weights
        folder = str(export.folder)
    if last is not None or best is not None:
        parts["checkpoints"] = 0 if best is None else size.weights
    if best is not None:
        folder = str(best.dirpath or folder)
    if last is not None:
        state = size.weights + (0 if last.save_weights_only else size.optimizer)
        parts["checkpoints"] += state * num_states(trainer, last.every_n_steps, last.keep)
        folder = str(last.dirpath or folder)
    told = ", ".join(f"{name} {format_bytes(one)}" for name, one in parts.items())
    total, free = sum(parts.values()), free_bytes(folder)
    if total > free:
        rank_zero_warn(
            f"The run may write {format_bytes(total)} ({told}), and {format_bytes(free)} are free "
            f"where {folder} is. Free some space, choose another folder, or save less: keep=1 or "
            "save_optimizer=False of LastCheckpoint."
        )
    row = f"at most about {format_bytes(total)} ({told}); {format_bytes(free)} are free"
    if last is not None and last.save_weights_only:
        row += "; no optimizer state is saved, so a run that stops cannot go on"
    return {"disk": row}
