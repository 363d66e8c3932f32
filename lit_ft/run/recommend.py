"""Find the best way to train a model on a card: what fits, by quality first and then by speed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from lit_ft.measure.cards import Card
from lit_ft.run.arguments import CONF, composed
from lit_ft.run.plan import PlannedRun, planned
from lit_ft.run.plan_savings import replaced

_QUALITY = CONF.parent / "benchmarks" / "results" / "quality.jsonl"


@dataclass(frozen=True)
class Method:
    """A way to train, and the name under which its quality was measured.

    Attributes:
        settings: The settings that choose it.
        measured_as: The name of its rows in `benchmarks/results/quality.jsonl`.
        devices: The numbers of devices that it is for: "one", "several" or "any".
        seconds: The time of a step, relative to AdamW's, where the benchmarks say so.
    """

    settings: tuple[str, ...]
    measured_as: str
    devices: str = "any"
    seconds: float = 1.0


METHODS = (
    Method(("optim=adamw", "update=whole"), "adamw", "one"),
    Method(("optim=adamw_8bit", "trainer.gradient_clip_val=null"), "adamw_8bit", "one"),
    Method(("optim=galore_subspace",), "galore_subspace_r128", "one"),
    Method(("optim=galore_subspace_8bit",), "galore_subspace_r128", "one"),
    Method(("optim=galore_subspace_8bit", "galore.rank=64"), "galore_subspace_r64", "one"),
    Method(("optim=adafactor_fixed", "trainer.gradient_clip_val=null"), "adafactor_fixed", "one"),
    Method(("adapter=lora", "optim=adamw_lora"), "lora_r16", "one", 0.8),
    Method(("optim=adamw", "strategy=ddp"), "adamw", "several"),
    Method(("optim=adamw_8bit", "strategy=ddp"), "adamw_8bit", "several"),
    Method(("optim=adamw", "strategy=fsdp"), "adamw", "several", 1.1),
    Method(("optim=adamw_8bit_torchao", "strategy=fsdp"), "adamw_8bit", "several", 1.1),
    Method(("optim=galore_subspace", "strategy=fsdp"), "galore_subspace_r128", "several", 1.1),
    Method(("adapter=lora", "optim=adamw_lora", "strategy=ddp"), "lora_r16", "several", 0.8),
)

_CHOSEN = {"adapter", "galore", "optim", "strategy", "update"}
_CHECKPOINTING = 4 / 3  # of the time of a step: forward runs twice
_SMALL_BATCHES = 1.1  # rows one by one keep a GPU less busy


@dataclass(frozen=True)
class Recipe:
    """Settings with which a run fits.

    Attributes:
        settings: The settings, in place of those of the same names.
        val_loss: The measured validation loss of the method at its best rate.
        seconds: The estimated time of a step, relative to AdamW's without checkpointing.
        run: The plan.
    """

    settings: tuple[str, ...]
    val_loss: float
    seconds: float
    run: PlannedRun


def recipes(arguments: Sequence[str], card: Card, devices: int) -> Iterator[Recipe | Method]:
    """Yield each method before it is planned, and then its fastest settings that fit, if any.

    Args:
        arguments: The arguments of the run. Its model, data and global batch are kept.
        card: The card that each device is.
        devices: The number of devices.
    """
    losses = measured_losses()
    own = [one for one in arguments if not _chooses_method(one)]
    for method in METHODS:
        if method.devices not in ("any", "one" if devices == 1 else "several"):
            continue
        yield method
        for settings, seconds in _variants(own, method):
            try:
                run = planned(composed([*own, *settings]))
            except ValueError:
                break  # the rules refuse it for this model
            if run.verdict == "fits":
                yield Recipe(settings, losses[method.measured_as], seconds, run)
                break
            if sum(run.plan.held_bytes.values()) > card.memory_bytes:
                break  # no batch is small enough


def best_of(found: Sequence[Recipe], number: int = 5) -> list[Recipe]:
    """Return the best recipes: those that learn best, of equals the fastest, then the smallest."""

    def order(recipe: Recipe) -> tuple[float, float, int]:
        # A difference below 0.005 is within the spread of seeds.
        return round(recipe.val_loss * 200), recipe.seconds, recipe.run.plan.peak_bytes

    return sorted(found, key=order)[:number]


def command_of(recipe: Recipe, arguments: Sequence[str], devices: int) -> list[str]:
    """Return the arguments of `train.py` for a recipe."""
    kept = [one for one in arguments if not _chooses_method(one) and not one.startswith("plan.")]
    several = [f"trainer.devices={devices}"] if devices > 1 else []
    if any(one.startswith("trainer.devices=") for one in kept):
        several = []
    return [*replaced(kept, recipe.settings), *several]


def measured_losses(file: Path = _QUALITY) -> dict[str, float]:
    """Return the validation loss of each measured method at its best rate, over all seeds."""
    by_rate: dict[tuple[str, float], list[float]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        row: dict[str, Any] = json.loads(line)
        if row["seed"] == 0:  # the only one that all methods have
            by_rate.setdefault((row["method"], row["lr"]), []).append(row["val_loss"])
    losses: dict[str, float] = {}
    for (method, _), found in by_rate.items():
        losses[method] = min(losses.get(method, float("inf")), mean(found))
    return losses


def _chooses_method(argument: str) -> bool:
    """Return whether an argument says how to train, which is what is looked for."""
    name = argument.partition("=")[0].lstrip("+~")
    group = name.partition(".")[0].partition("@")[0]
    return group in _CHOSEN or name in ("module.activation_checkpointing", "trainer.precision")


def _variants(arguments: Sequence[str], method: Method) -> Iterator[tuple[tuple[str, ...], float]]:
    """Yield the settings of a method that take less and less memory, with their time."""
    config = composed([*arguments, *method.settings])
    rows, micro_batches = config["data"]["batch_size"], config["trainer"]["accumulate_grad_batches"]
    checkpointed = "module.activation_checkpointing=true"
    yield method.settings, method.seconds
    yield (*method.settings, checkpointed), method.seconds * _CHECKPOINTING
    if rows > 1:
        one_by_one = (
            "data.batch_size=1",
            f"trainer.accumulate_grad_batches={rows * micro_batches}",
        )
        seconds = method.seconds * _CHECKPOINTING * _SMALL_BATCHES
        yield (*method.settings, checkpointed, *one_by_one), seconds
