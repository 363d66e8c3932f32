"""Show in TensorBoard what a run was, and compare its result with those of other runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

_CHOICES = ("optim", "galore", "adapter", "update", "schedule", "strategy")
_VALUES = ("data.batch_size", "data.max_length", "trainer.accumulate_grad_batches", "seed")


def hparams(choices: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what runs are compared by in TensorBoard's HPARAMS: choices, rates and sizes.

    Args:
        choices: The chosen name in each group, from Hydra's `hydra.runtime.choices`.
        config: The resolved configuration.
    """
    found = {group: choices.get(group) for group in _CHOICES}
    found["lr"] = _at(config, "optim.lr")
    rank = "adapter.r" if choices.get("adapter") not in (None, "none") else "galore.rank"
    found["rank"] = _at(config, rank)
    found |= {name.rpartition(".")[2]: _at(config, name) for name in _VALUES}
    return {name: value for name, value in found.items() if value is not None}


def show_start(trainer: Trainer, facts: Mapping[str, str]) -> None:
    """Write a card with what the run is.

    Args:
        trainer: The trainer of the run.
        facts: The facts, keyed by what they are about.
    """
    for logger in _loggers(trainer):
        rows = [f"| {name} | `{fact}` |" for name, fact in facts.items()]
        logger.experiment.add_text("run", "\n".join(["| | |", "| --- | --- |", *rows]))


def show_end(
    trainer: Trainer, params: Mapping[str, Any], metrics: Mapping[str, float | None]
) -> None:
    """Write the run's row of the HPARAMS table.

    Args:
        trainer: The trainer of the run.
        params: What `hparams` returns.
        metrics: The results, keyed by name.
    """
    results = {f"result/{name}": value for name, value in metrics.items() if value is not None}
    for logger in _loggers(trainer):
        logger.log_hyperparams(dict(params), results, step=trainer.global_step)
        logger.finalize("success")


def _loggers(trainer: Trainer) -> Iterator[TensorBoardLogger]:
    if trainer.is_global_zero:
        yield from (one for one in trainer.loggers if isinstance(one, TensorBoardLogger))


def _at(node: Any, name: str) -> Any:
    for part in name.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node
