"""A callback that writes the most memory that torch's CPU allocator had in use in a run."""

from __future__ import annotations

import json
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from support.counted import peak_and_restart


class PeakProbe(Callback):
    """Reads the peak of each part of a run, from ahead of the model to the end of the run's fit.

    The process must run with `count_allocations.c` in LD_PRELOAD. Each rank writes its own file.

    Args:
        folder: The folder for the files.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.peaks: dict[str, int] = {}  # keyed by part
        self._part: str | None = None
        self._has_trained = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin with the loading of the model."""
        self._begin("loading")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the training."""
        self._begin("training")
        self._has_trained = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with what follows the training."""
        self._begin("end of training")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with a validation."""
        self._begin("validation")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a validation; after the last one, write the file."""
        self._begin("training" if trainer.training else "between")
        if self._has_trained and not trainer.training:
            rank = trainer.global_rank
            text = json.dumps({"rank": rank, "peaks": self.peaks}) + "\n"
            (self.folder / f"rank_{rank}.json").write_text(text, encoding="utf-8")

    def _begin(self, part: str) -> None:
        peak = peak_and_restart()
        if self._part is not None:
            self.peaks[self._part] = max(self.peaks.get(self._part, 0), peak)
        self._part = part
