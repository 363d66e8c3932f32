"""Find the best way to train a model on a card: what fits, by quality first and then by speed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

from lit_ft.measure.cards import Card
from lit_ft.run.arguments import ROOT, composed
from lit_ft.run.override import name_of
from lit_ft.run.plan import planned
from lit_ft.run.plan_savings import replaced
from lit_ft.run.planned_run import PlannedRun

_QUALITY = ROOT / "benchmarks" / "results" / "quality.jsonl"


@dataclass(frozen=True)
class Method:
    """A way to train, and the name under which its quality was measured.

    Attributes:
        settings: The settings that choose it.
        measured_as: The name of its rows in `benchmarks/results/quality.jsonl`, if it has any.
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
    Method(("adapter=qlora", "optim=adamw_lora"), "qlora", "one"),
    Method(("optim=adamw", "strategy=ddp"), "adamw", "several"),
    Method(("optim=adamw_8bit", "strategy=ddp"), "adamw_8bit", "several"),
    Method(("optim=adamw", "strategy=fsdp"), "adamw", "several", 1.1),
    Method(("optim=adamw_8bit_torchao", "strategy=fsdp"), "adamw_8bit", "several", 1.1),
    Method(("optim=galore_subspace", "strategy=fsdp"), "galore_subspace_r128", "several", 1.1),
    Method(
        ("optim=adamw_8bit_torchao", "galore=online", "strategy=fsdp"),
        "galore_subspace_r128",
        "several",
        1.1,
    ),
    Method(("adapter=lora", "optim=adamw_lora", "strategy=ddp"), "lora_r16", "several", 0.8),
    Method(("adapter=qlora", "optim=adamw_lora", "strategy=ddp"), "qlora", "several"),
)

_CHOSEN = {"adapter", "galore", "optim", "strategy", "update"}
_NARROW = "trainer.precision=bf16-true"  # weights in 16 bits, rounded stochastically
_CHECKPOINTING = 4 / 3  # of the time of a step: forward runs twice
_SMALL_BATCHES = 1.1  # rows one by one keep a GPU less busy


@dataclass(frozen=True)
class Recipe:
    """Settings with which a run fits.

    Attributes:
        settings: The settings, in place of those of the same names.
        val_loss: The measured validation loss of the method at its best rate; None if it has not
            been measured.
        seconds: The estimated time of a step, relative to AdamW's without checkpointing.
        run: The plan.
    """

    settings: tuple[str, ...]
    val_loss: float | None
    seconds: float
    run: PlannedRun


@dataclass(frozen=True)
class Advice:
    """The best ways to train on a card.

    Attributes:
        arguments: The arguments of the run that was asked for.
        card: The card that each device is.
        devices: The number of devices.
        recipes: The recipes that fit, the best first.
    """

    arguments: list[str]
    card: Card
    devices: int
    recipes: list[Recipe]

    def to_dict(self) -> dict[str, Any]:
        """Return the advice as plain values, with the arguments of `train.py` for each recipe."""
        recipes = [
            {
                "settings": recipe.settings,
                "val_loss": recipe.val_loss,
                "seconds": recipe.seconds,
                "peak_bytes": recipe.run.plan.peak_bytes,
                "outside_bytes": asdict(recipe.run.outside),
                "verdict": recipe.run.verdict,
                "arguments": command_of(recipe, self.arguments, self.devices),
            }
            for recipe in self.recipes
        ]
        return {"card": asdict(self.card), "devices": self.devices, "recipes": recipes}


@dataclass
class Planner:
    """Plans each run once, for cards of all sizes: the size of a card does not change its plan.

    Attributes:
        runs: What has been planned, keyed by what it depends on; None if the rules refuse it.
    """

    runs: dict[tuple[Any, ...], PlannedRun | None] = field(default_factory=dict)

    def run(self, arguments: Sequence[str], card: Card, devices: int) -> PlannedRun | None:
        """Return the run of the arguments on so many cards; None if the rules refuse it."""
        others = tuple(one for one in arguments if name_of(one) != "plan.gpu")
        key = (others, devices, card.has_bfloat16)
        if key not in self.runs:
            try:
                self.runs[key] = planned(composed(arguments))
            except ValueError:
                self.runs[key] = None
        found = self.runs[key]
        return found and replace(found, card=card)


def recipes(
    arguments: Sequence[str], card: Card, devices: int, planner: Planner
) -> Iterator[Recipe | Method]:
    """Yield each method before it is planned, and then its fastest settings that fit, if any.

    Args:
        arguments: The arguments of the run. Its model, data and global batch are kept.
        card: The card that each device is.
        devices: The number of devices.
        planner: The planner, which may know runs from other cards.
    """
    losses = measured_losses()
    own = [one for one in arguments if not _chooses_method(one)]
    for method in METHODS:
        if method.devices not in ("any", "one" if devices == 1 else "several"):
            continue
        yield method
        without_rows = 0  # the bytes that no smaller batch brings down
        for settings, seconds in _variants(own, method, card):
            if without_rows > card.memory_bytes and _NARROW not in settings:
                continue
            run = planner.run([*own, *settings], card, devices)
            if run is None:
                break
            if run.verdict == "fits":
                yield Recipe(settings, losses.get(method.measured_as), seconds, run)
                break
            without_rows = sum(run.plan.held_bytes.values())
            if without_rows > card.memory_bytes and _NARROW in settings:
                break


def best_of(found: Sequence[Recipe], number: int = 5) -> list[Recipe]:
    """Return the best recipes: those that learn best, of equals the fastest, then the smallest.

    Those that have not been measured come last.
    """

    def order(recipe: Recipe) -> tuple[float, float, int]:
        # A difference below 0.005 is within the spread of seeds.
        loss = math.inf if recipe.val_loss is None else round(recipe.val_loss * 200)
        return loss, recipe.seconds, recipe.run.plan.peak_bytes

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
    name = name_of(argument)
    group = name.partition(".")[0].partition("@")[0]
    return group in _CHOSEN or name in ("module.activation_checkpointing", "trainer.precision")


def _variants(
    arguments: Sequence[str], method: Method, card: Card
) -> Iterator[tuple[tuple[str, ...], float]]:
    """Yield the settings of a method that take less and less memory, with their time."""
    config = composed([*arguments, *method.settings])
    rows, micro_batches = config["data"]["batch_size"], config["trainer"]["accumulate_grad_batches"]
    checkpointed = "module.activation_checkpointing=true"
    least: tuple[str, ...] = (*method.settings, checkpointed)
    yield method.settings, method.seconds
    yield least, method.seconds * _CHECKPOINTING
    if "strategy=fsdp" in method.settings and card.has_bfloat16:
        least = (*least, _NARROW)  # the others have it by default
        yield least, method.seconds * _CHECKPOINTING
    if rows > 1:
        one_by_one = (
            "data.batch_size=1",
            f"trainer.accumulate_grad_batches={rows * micro_batches}",
        )
        seconds = method.seconds * _CHECKPOINTING * _SMALL_BATCHES
        yield (*least, *one_by_one), seconds
