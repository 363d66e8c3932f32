"""Plan the memory of a run in a process of its own, while the run loads.

The plan is made on fake tensors, which change torch for a whole process; so no thread can make it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lit_ft.terminal.styles import is_first_rank

_ROOT = Path(__file__).parents[2]
_NICENESS = 10
# A plan needs no GPU, and its process shall take no memory of one.
_NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}


def wants_plan(config: DictConfig, mode: RunMode | None) -> bool:
    """Return whether a job plans its memory: on the first rank of a training, not in a sweep.

    Args:
        config: The configuration, which nobody has checked yet.
        mode: Hydra's mode.
    """
    check, validates = (
        OmegaConf.select(config, name, throw_on_resolution_failure=False)
        for name in ("plan.check", "validate_only")
    )
    return check is True and not validates and mode != RunMode.MULTIRUN and is_first_rank()


class BackgroundPlan:
    """A process that plans a run. It ends with the block, and with this process if that is killed.

    The process is started before what to plan is known, because it imports for seconds.

    Args:
        wanted: Whether to start it; False makes an object without a plan.
    """

    def __init__(self, *, wanted: bool = True) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        if not wanted:
            return
        paths = [str(_ROOT), *filter(None, sys.path)]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "lit_ft.run.plan_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={
                **os.environ,
                **_NO_GPU,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(paths),
            },
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def is_under_way(self) -> bool:
        """Whether there is a process whose answer has not been taken."""
        return self._process is not None

    def ask(self, config: Mapping[str, Any], *, device_type: str) -> None:
        """Say what to plan.

        Args:
            config: The resolved configuration, which must name only trusted classes.
            device_type: The type of the devices to train on, "cpu" or "cuda".

        Raises:
            TypeError: If the configuration has values that are not plain.
        """
        line = json.dumps({"config": config, "device_type": device_type}) + "\n"
        assert self._process is not None and self._process.stdin is not None
        with suppress(OSError):  # it has ended, as `answer` will say
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()

    def give_way(self) -> None:
        """Let this process go first where both need the same core, because it does not wait."""
        if self._process is not None and hasattr(os, "setpriority"):
            with suppress(OSError):  # it has ended
                os.setpriority(os.PRIO_PROCESS, self._process.pid, _NICENESS)

    def answer(self, *, timeout: float = 0.0) -> dict[str, Any] | None:
        """Return the answer, once: the `plan` or `why_not`; None if there is none yet.

        Args:
            timeout: The longest time to wait for it, in seconds.
        """
        if self._process is None:
            return None
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        assert self._process.stdout is not None
        told = self._process.stdout.read()
        self.close()
        try:
            answer: dict[str, Any] = json.loads(told)
        except ValueError:
            return {"why_not": f"the process that plans it ended with status {status}"}
        return answer

    def close(self) -> None:
        """End the process, whatever it does."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with suppress(OSError):  # it has not read all
                pipe.close()
