"""What one process of peers.py does: a row at one rate and seed, whole or a part of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

SETTINGS = {  # of each model: what the settings of rows are filled in with
    "smollm2": {"rank": 128, "min_grad_bytes": 2**20},
    "tiny": {"rank": 16, "min_grad_bytes": 0},
}


@dataclass(frozen=True)
class Job:
    """One training of a row.

    Args:
        rate: The largest learning rate of the schedule.
        seed: The seed of the order of the examples, and of new weights.
        model: The model's name in `SETTINGS`.
        steps: The number of optimizer steps of the whole run, which is the length of the schedule.
        batch_size: The number of examples in a batch.
        max_length: The most tokens of an example; longer ones are left out.
        val_examples: The number of held-out examples.
        threads: The number of torch's threads.
        folder: The folder of what the process writes, its checkpoint among it.
        stop_after: The number of steps after which the run saves its state and ends; None for none.
        resumes: Whether the run goes on from the checkpoint in `folder`.
        weights: Whether the weights at the end are written, in place of a held-out loss.
        turns: The descriptor that the end of each step is told through; None to wait for nobody.
    """

    rate: float
    seed: int
    model: str
    steps: int
    batch_size: int
    max_length: int
    val_examples: int
    threads: int
    folder: str
    stop_after: int | None = None
    resumes: bool = False
    weights: bool = False
    turns: int | None = None

    @property
    def result(self) -> Path:
        """The file of the figures."""
        return Path(self.folder) / "result.json"

    @property
    def last_weights(self) -> Path:
        """The file of the weights at the end."""
        return Path(self.folder) / "weights.pt"

    def filled(self, text: str) -> str:
        """Return a setting with the model's values in the place of their names."""
        return text.format(**SETTINGS[self.model])

    def write(self, file: Path) -> None:
        """Write the job for the process that does it."""
        file.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> Job:
        """Read a job that `write` has written."""
        values: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return cls(**values)


class Trained(NamedTuple):
    """What a row returns.

    Args:
        model: The trained model.
        rate: The learning rate that the weights had at the end; None if none was trained.
        note: What else a reader must know; None for nothing.
    """

    model: Any
    rate: float | None = None
    note: str | None = None
