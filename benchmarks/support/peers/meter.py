"""What is measured in each row in the same way: seconds, tokens, memory, and which batches."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from support.counted import peak_and_restart
from support.peers.job import Job

SKIPPED_STEPS = 3  # they allocate, and warm the caches


class Meter:
    """Measures a training from its first step to its last; needs Linux.

    Whoever trains calls `begins` when model and optimizer are ready and no step is taken, `sees`
    with each batch, `step_ends` after each step, and `ends` when the last step is done.

    Args:
        job: The job. If it takes turns, each step waits for a line on stdin.
    """

    def __init__(self, job: Job) -> None:
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        self.memory: dict[str, int | None] = {}
        self._batches = hashlib.sha256()
        self._job = job
        self._told = None if job.turns is None else os.fdopen(job.turns, "w", buffering=1)
        self._began = 0.0
        self._resident: int | None = None  # without it, growth is not known

    def begins(self) -> None:
        """Begin to measure memory, and time the first step."""
        with suppress(AttributeError):
            peak_and_restart()
        with suppress(OSError):  # some containers refuse it, and VmHWM goes on from before
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM begins again
            self._resident = _status("VmRSS")
        self._wait()
        self._began = time.perf_counter()

    def sees(self, batch: Mapping[str, Any]) -> None:
        """Count the tokens of a batch that are not padding."""
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        self.tokens.append(ids.numel() if mask is None else int(mask.sum()))
        for tensor in (ids, batch["labels"][:, 1:]):
            self._batches.update(tensor.contiguous().numpy().tobytes())

    def watching(self, collator: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Return a collator that shows each batch to this meter: callbacks of Trainer see none."""

        def collate(rows: Any) -> Any:
            batch = collator(rows)
            self.sees(batch)
            return batch

        return collate

    def step_ends(self) -> None:
        """Note the seconds since the last step."""
        self.seconds.append(time.perf_counter() - self._began)
        if self._told is not None:
            print(self.seconds[-1], self.tokens[len(self.seconds) - 1], file=self._told)
            if len(self.seconds) < self._job.steps:
                self._wait()
        self._began = time.perf_counter()

    def ends(self) -> None:
        """Note the peaks of memory since `begins`."""
        begun = self._resident
        self.memory["rss_growth_bytes"] = None if begun is None else _status("VmHWM") - begun
        try:
            self.memory["peak_bytes"] = peak_and_restart()
        except AttributeError:
            self.memory["peak_bytes"] = None

    def figures(self) -> dict[str, Any]:
        """Return what was measured; nothing if nothing was trained."""
        if not self.seconds:
            return {}
        return {
            **self.memory,
            "tokens": sum(self.tokens),
            "step_seconds": self.seconds,
            "step_tokens": self.tokens,
            "batches": self._batches.hexdigest()[:16],
        }

    def _wait(self) -> None:
        if self._told is not None and not sys.stdin.readline():
            raise SystemExit("Nobody gives turns any more.")


def _status(name: str) -> int:
    """Return a line of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {name}")
