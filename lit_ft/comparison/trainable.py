"""A method that is to be trained: its arguments, and what makes its runs what they are."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_ft.comparison.cells import Cell, cell_of, files_of
from lit_ft.run.arguments import composed
from lit_ft.run.override import name_of

_RUNGS = 4  # validations of a run, at which bad ones end
# Nothing is kept of a run but its figures.
_NOT_NEEDED = ("samples", "last_checkpoint", "best_checkpoint", "export")


@dataclass(frozen=True)
class Trainable:
    """A method to train.

    Attributes:
        arguments: The arguments of its runs, without those that differ between them.
        config: The configuration of its runs, as plain values.
        files: The sizes and times of the files that its runs read.
    """

    arguments: Sequence[str]
    config: Mapping[str, Any]
    files: Mapping[str, Any]

    @property
    def learning_rate(self) -> float | None:
        """The learning rate of its own choice; None if the optimizer sets one itself."""
        rate = self.config["optim"].get("lr")
        return None if rate is None else float(rate)

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration without what a comparison alone reads."""
        return {name: one for name, one in self.config.items() if name != "compare"}

    def cell(self, own: Sequence[str], named: Collection[str], folder: Path) -> Cell:
        """Return one of its runs.

        Args:
            own: The arguments that the run has in addition.
            named: The names of the settings that tell methods apart.
            folder: The folder of all runs.
        """
        choices = [one for one in self.arguments if name_of(one) in named]
        arguments = [*self.arguments, *own]
        settings = {
            "config": self.settings,
            "arguments": sorted(arguments),
            "files": self.files,
        }
        return cell_of(" ".join([*choices, *own]), arguments, settings, folder)


def trainable(arguments: Sequence[str]) -> Trainable:
    """Return the method with these arguments of `train.py`.

    Its runs keep no weights and measure forgetting. Unless the arguments say otherwise, they log
    nothing, and validate about four times.

    Raises:
        ValueError: If an argument is wrong.
    """
    config = composed([*arguments, "run_dir=RUN_DIR"])
    return Trainable([*arguments, *_further(arguments, config)], config, files_of(config))


def _further(arguments: Sequence[str], config: Mapping[str, Any]) -> Iterator[str]:
    given = {name_of(one) for one in arguments}
    callbacks = config["callbacks"] or {}
    yield from (f"~callbacks.{name}" for name in _NOT_NEEDED if name in callbacks)
    if callbacks and "forgetting" not in callbacks:
        yield "+callbacks.forgetting._target_=lit_ft.callbacks.Forgetting"
    if "logger" not in given:
        yield "logger=none"
    if "trainer.val_check_interval" not in given:
        yield from _rungs(config["trainer"])


def _rungs(trainer: Mapping[str, Any]) -> Iterator[str]:
    """Yield the setting with which a run validates a few times, after equal numbers of rows."""
    epochs = trainer["max_epochs"]
    if trainer["max_steps"] >= _RUNGS:
        micro_batches = trainer["max_steps"] * trainer["accumulate_grad_batches"]
        yield f"trainer.val_check_interval={math.ceil(micro_batches / _RUNGS)}"
    elif epochs is not None and epochs > 0:
        # Lightning takes parts of epochs only if it counts epochs.
        yield f"trainer.val_check_interval={1.0 if epochs > 1 else 1 / _RUNGS}"
        yield f"trainer.check_val_every_n_epoch={math.ceil(epochs / _RUNGS)}"
