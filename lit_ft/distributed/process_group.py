"""The options of the group of processes that a strategy starts."""

from __future__ import annotations

from datetime import timedelta
from typing import TypedDict


class ProcessGroupOptions(TypedDict, total=False):
    """What `torch.distributed.init_process_group` takes, by Lightning's names.

    Attributes:
        process_group_backend: The backend, such as "nccl" or "gloo".
        timeout: The longest time that a rank waits for the others.
    """

    process_group_backend: str | None
    timeout: timedelta | None
