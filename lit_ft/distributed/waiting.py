"""Wait for what the first rank does alone."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from uuid import uuid4

from lightning.pytorch import Trainer
from torch import distributed as dist

_PATIENCE = 0.5  # seconds between two looks
_CONNECTS = timedelta(seconds=30)  # the store has been there since the ranks found each other


@contextmanager
def others_wait(trainer: Trainer) -> Iterator[bool]:
    """Let the first rank do the block alone, however long that takes; all ranks must enter it.

    In a collective, the other ranks would wait no longer than the timeout of the process group, and
    then end the run. So they ask the store at `MASTER_ADDR` and `MASTER_PORT`, where the ranks have
    found each other. If it cannot be reached, they do not wait here, and the timeout counts. If the
    first rank goes, its store does too, or its launcher ends the others.

    Args:
        trainer: The trainer of the ranks.

    Yields:
        Whether this rank is the first one. Others leave the block at once, and wait after it.
    """
    store = _store() if trainer.world_size > 1 else None
    if not trainer.strategy.reduce_boolean_decision(store is not None):
        yield trainer.is_global_zero
        return
    assert store is not None
    done = trainer.strategy.broadcast(f"lit_ft/{uuid4().hex}")  # a restarted run keeps its store
    try:
        yield trainer.is_global_zero
    finally:
        if trainer.is_global_zero:
            store.set(done, "")
    while not store.check([done]):
        time.sleep(_PATIENCE)
    trainer.strategy.barrier()  # the first rank may hold the store, which the others still ask


def _store() -> Any:
    """Return a connection of this rank's own to the store of the ranks; None if there is none."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not dist.is_available() or not dist.is_initialized() or not host or not port:
        return None
    try:
        return dist.TCPStore(  # type: ignore[attr-defined]
            host, int(port), is_master=False, timeout=_CONNECTS, wait_for_workers=False
        )
    except (RuntimeError, ValueError):
        return None
