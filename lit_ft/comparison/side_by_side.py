"""What each of several runs that train at the same time may use."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from lit_ft.compat.cores import usable_cores

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_THREADS = "OMP_NUM_THREADS"


def shares_of(jobs: int, gpus: int) -> Sequence[Mapping[str, str]]:
    """Return the variables that give each of `jobs` runs a GPU, or its part of the cores.

    With more runs than GPUs, several share one.

    Args:
        jobs: The number of runs at a time.
        gpus: The number of GPUs that this process sees.
    """
    if jobs == 1:
        return [{}]
    if gpus:
        seen = os.environ.get(_VISIBLE, ",".join(map(str, range(gpus)))).split(",")
        return [{_VISIBLE: seen[job % gpus]} for job in range(jobs)]
    if _THREADS in os.environ:
        return [{}] * jobs
    return [{_THREADS: str(max(1, usable_cores() // jobs))}] * jobs
