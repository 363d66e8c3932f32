"""Which settings go together: the rules asked about every combination of the choices in conf/.

`python -m tests.support.matrix` prints the table, `--write` puts it into the docs.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from omegaconf import OmegaConf

from lit_ft import CausalLMModule
from lit_ft.callbacks._support.trainer import callbacks_of
from lit_ft.compat.matrix import support_table
from lit_ft.compat.optimizers import class_of, traits_of
from lit_ft.compat.plan import Basis, Plan, adapter_of, parallel_of
from lit_ft.compat.refusal import Refusal, Remedy
from lit_ft.compat.remedies import PRESETS
from lit_ft.compat.rules import refusals
from tests.support.running import CONF

PAGE = CONF.parent / "docs" / "what-goes-together.md"
BEGIN, END = "<!-- support matrix: begin -->\n", "<!-- support matrix: end -->\n"
# Of those that differ in the device alone the first: auto, cpu and single_gpu are one strategy.
STRATEGIES = (
    "single_gpu",
    "single_gpu_offload",
    "ddp",
    "fsdp",
    "fsdp_offload",
    "hsdp",
    "tensor_parallel",
)


def _choices(group: str) -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in (CONF / group).glob("*.yaml")))


DIMENSIONS: dict[str, tuple[Any, ...]] = {
    # adamw_lora is adamw with another learning rate; presets are an optimizer with GaLore.
    "optim": tuple(n for n in _choices("optim") if n not in PRESETS and n != "adamw_lora"),
    "galore": ("none", *(name for name in _choices("galore") if name != "none")),
    "strategy": STRATEGIES,
    "update": ("whole", "layerwise", "blocks"),
    "accumulate": (1, 2),
    "clip": ("none", "norm", "value"),
    "adapter": ("none", *(name for name in _choices("adapter") if name != "none")),
}


@dataclass(frozen=True)
class Cell:
    """One combination."""

    optim: str = "adamw"
    galore: str = "none"
    strategy: str = "single_gpu"
    update: str = "whole"
    accumulate: int = 1
    clip: str = "none"
    adapter: str = "none"

    @property
    def overrides(self) -> list[str]:
        """What follows `python train.py`."""
        groups = ("strategy", "update", "adapter", "optim", "galore")
        chosen = [f"{name}={getattr(self, name)}" for name in groups]
        return [*chosen, *_trainer_overrides(self.accumulate, self.clip)]

    @property
    def plan(self) -> Plan:
        """What the rules look at."""
        facts: dict[str, Any] = {}
        for group in DIMENSIONS:
            facts |= facts_of(group, getattr(self, group))
        return Plan(**facts)


def cells() -> Iterator[Cell]:
    """Yield all of them."""
    for values in itertools.product(*DIMENSIONS.values()):
        yield Cell(*values)


@cache
def facts_of(group: str, choice: Any) -> dict[str, Any]:
    """Return what one choice of conf/ contributes to a plan."""
    if group == "update":
        in_turns = choice == "blocks"
        return {
            "layerwise": choice == "layerwise",
            "blocks": in_turns,
            "drops_state": in_turns,
        }
    if group in ("accumulate", "clip"):
        return {group: choice}
    config = composed(f"{group}={choice}", *([] if group == "strategy" else ["strategy=cpu"]))
    if group == "optim":
        kind = class_of(instantiate(config["optim"], _convert_="all"))
        assert kind is not None
        return {"optimizer": kind.__name__, "traits": traits_of(kind)}
    if group == "galore":
        node = config["callbacks"].get("galore")
        if node is None:
            return {"basis": None}
        projector = instantiate(node["projector"])
        return {"basis": Basis(type(projector).__name__, projector.forms_gradients)}
    if group == "adapter":
        config_of_adapter = instantiate(config["adapter"], _convert_="all")
        quantised = config["model"].get("quantization_config") is not None
        return {"adapter": adapter_of(config_of_adapter), "quantised": quantised}
    strategy = type(_trainer(choice, 1, "none").strategy)
    return {"parallel": parallel_of(strategy), "strategy": strategy.__name__}


@cache
def refusal(cell: Cell) -> Refusal | None:
    """Return the first thing that the rules say; None: it trains."""
    return next(refusals(cell.plan), None)


def after(cell: Cell, remedy: Remedy) -> Cell | None:
    """Return the combination with a remedy's settings; None if it is about something else."""
    settings = dict(remedy.settings)
    if "trainer.gradient_clip_val" in settings:
        settings["clip"] = "none"
    if settings.get("optim") in PRESETS:
        settings["optim"], settings["galore"] = PRESETS[settings["optim"]]
    elif "optim" in settings:
        settings.setdefault("galore", "none")
    known = {key: value for key, value in settings.items() if key in DIMENSIONS}
    return replace(cell, **known) if known else None


def module_and_trainer(cell: Cell) -> tuple[CausalLMModule, Trainer]:
    """Return what the combination trains with, of which nothing is set up."""
    config = composed(*cell.overrides, "trainer.accelerator=cpu")
    made = {
        key: instantiate(config[key], _convert_="all")
        for key in ("model", "optim", "groups", "adapter")
    }
    module = CausalLMModule(
        made["model"], optimizer=made["optim"], groups=made["groups"], adapter=made["adapter"]
    )
    trainer = _trainer(cell.strategy, cell.accumulate, cell.clip)
    callbacks_of(trainer)[:] = [
        instantiate(node, _convert_="all") for node in config["callbacks"].values()
    ]
    module.trainer = trainer
    return module, trainer


def table() -> str:
    """Return the docs' table and its notes, in Markdown."""
    optimizers, galore, strategies = (
        {choice: facts_of(group, choice) for choice in DIMENSIONS[group]}
        for group in ("optim", "galore", "strategy")
    )
    others = ("update", "accumulate", "clip", "adapter")
    variations = [
        {
            key: value
            for group, choice in zip(others, values, strict=True)
            for key, value in facts_of(group, choice).items()
        }
        for values in itertools.product(*(DIMENSIONS[name] for name in others))
    ]
    return support_table(optimizers, galore, strategies, variations)


@cache
def composed(*overrides: str) -> Any:
    """Return the main job's configuration without callbacks of the user's and loggers."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(
            "train", [*overrides, "~local", "callbacks=none", "logger=none", "run_dir=."]
        )
    return OmegaConf.to_container(config, resolve=True)


@cache
def _trainer(strategy: str, accumulate: int, clip: str) -> Trainer:
    devices = 1 if strategy.startswith("single") else 2
    config = composed(
        f"strategy={strategy}",
        "optim=adamw",
        "trainer.accelerator=cpu",
        f"trainer.devices={devices}",
        *_trainer_overrides(accumulate, clip),
    )
    trainer: Trainer = instantiate(config["trainer"], _convert_="all")
    return trainer


def _trainer_overrides(accumulate: int, clip: str) -> list[str]:
    algorithm = "value" if clip == "value" else "norm"
    return [
        f"trainer.accumulate_grad_batches={accumulate}",
        f"trainer.gradient_clip_val={'null' if clip == 'none' else '0.5'}",
        f"+trainer.gradient_clip_algorithm={algorithm}",
    ]


def write(page: Path = PAGE) -> None:
    """Put the table between its marks."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after_it = rest.partition(END)
    page.write_text(before + BEGIN + table() + END + after_it)


if __name__ == "__main__":
    write() if "--write" in sys.argv else print(table())
