"""Which settings go together: asked of the validators themselves, and written into the README.

`python -m tests.support_matrix` prints the table, `--write` puts it into the README.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from omegaconf import OmegaConf

from lit_ft import CausalLMModule
from lit_ft.callbacks._support.trainer import callbacks_of
from tests.running import CONF

README = CONF.parent / "README.md"
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
    # adamw_lora is adamw with another learning rate.
    "optim": (
        *(name for name in _choices("optim") if name != "adamw_lora"),
        "adafactor_fixed galore=iteration",
        "adamw galore=paper",
        "adamw_8bit galore=iteration",
        "adamw_8bit_torchao galore=online",
    ),
    "strategy": STRATEGIES,
    "update": ("whole", "layerwise"),
    "accumulate": (1, 2),
    "clip": ("none", "norm", "value"),
    "adapter": ("none", *(name for name in _choices("adapter") if name != "none")),
}


@dataclass(frozen=True)
class Cell:
    """One combination."""

    optim: str = "adamw"
    strategy: str = "single_gpu"
    update: str = "whole"
    accumulate: int = 1
    clip: str = "none"
    adapter: str = "none"

    @property
    def overrides(self) -> list[str]:
        """What follows `python train.py`."""
        groups = [f"{name}={getattr(self, name)}" for name in ("strategy", "update", "adapter")]
        return [
            *groups,
            *f"optim={self.optim}".split(),
            *_trainer_overrides(self.accumulate, self.clip),
        ]


def cells() -> Iterator[Cell]:
    """Yield all of them."""
    for values in itertools.product(*DIMENSIONS.values()):
        yield Cell(*values)


def module_and_trainer(cell: Cell) -> tuple[CausalLMModule, Trainer]:
    """Return what the combination trains with, of which nothing is set up."""
    optim = _objects("optim", cell.optim)
    module = CausalLMModule(
        _objects("adapter", cell.adapter)["model"],
        optimizer=optim["optim"],
        groups=optim["groups"],
        adapter=_objects("adapter", cell.adapter)["adapter"],
    )
    trainer = _trainer(cell.strategy, cell.accumulate, cell.clip)
    callbacks_of(trainer)[:] = [*optim["callbacks"], *_objects("update", cell.update)["callbacks"]]
    module.trainer = trainer
    return module, trainer


@cache
def refusal(cell: Cell) -> str | None:
    """Return what the validators say, asked in Lightning's order; None: it trains."""
    module, trainer = module_and_trainer(cell)
    try:
        for callback in callbacks_of(trainer):
            callback.setup(trainer, module, "fit")
        module.setup("fit")
    except MisconfigurationException as error:
        return str(error)
    return None


def remedies(cell: Cell, message: str) -> list[Cell]:
    """Return the combinations that a refusal proposes: the alternatives in its last sentence."""
    _, _, proposals = message.rpartition(": ")
    found = []
    for alternative in re.split(r",? or |, (?=\w+=)", proposals):
        settings = dict(re.findall(r"([\w.]+)=(\w+)", alternative))
        if "trainer.gradient_clip_val" in settings:
            settings["clip"] = "none"
        known = {key: value for key, value in settings.items() if key in DIMENSIONS}
        if known:
            found.append(replace(cell, **known))
    return found


def table() -> str:
    """Return the README's table and its notes, in Markdown."""
    notes: dict[str, int] = {}
    rows = []
    for optim in DIMENSIONS["optim"]:
        row = [f"`{optim}`"]
        for strategy in STRATEGIES:
            plain = Cell(optim, strategy)
            numbers = [notes.setdefault(said, len(notes) + 1) for said in _refusals(plain)]
            marks = f" <sup>{', '.join(map(str, sorted(numbers)))}</sup>" if numbers else ""
            row.append(f"{'no' if refusal(plain) else 'yes'}{marks}")
        rows.append(f"| {' | '.join(row)} |")
    header = f"| `optim` | {' | '.join(f'`{name}`' for name in STRATEGIES)} |"
    lines = [header, "| --- " * (len(STRATEGIES) + 1) + "|", *rows, ""]
    lines += [f"{number}. {message}" for message, number in notes.items()]
    return "\n".join(lines) + "\n"


def _refusals(plain: Cell) -> list[str]:
    """Return why the plain combination is refused, or, if it is not, each of its variations."""
    if (message := refusal(plain)) is not None:
        return [message]
    said: dict[str, None] = {}
    for values in itertools.product(
        *(DIMENSIONS[name] for name in ("update", "accumulate", "clip", "adapter"))
    ):
        message = refusal(Cell(plain.optim, plain.strategy, *values))
        if message is not None:
            said[message] = None
    return list(said)


@cache
def _objects(group: str, name: str) -> dict[str, Any]:
    """Return what one choice beside the plainest others makes; no `setup` changes any of it."""
    plain = {"optim": "adamw", "strategy": "cpu", "update": "whole", "adapter": "none"}
    chosen = {**plain, group: name}
    config = composed(*(part for key, value in chosen.items() for part in f"{key}={value}".split()))
    made = {
        key: instantiate(config[key], _convert_="all")
        for key in ("model", "optim", "groups", "adapter")
    }
    callbacks = [instantiate(node, _convert_="all") for node in config["callbacks"].values()]
    return {**made, "callbacks": callbacks}


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


def write(readme: Path = README) -> None:
    """Put the table between its marks."""
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(before + BEGIN + table() + END + after)


if __name__ == "__main__":
    write() if "--write" in sys.argv else print(table())
