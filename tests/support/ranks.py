"""Ranks on this machine: real processes that torch.distributed's gloo connects."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache, partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

WORLD = 2  # ranks of most tests


@contextmanager
def ranks(world: int = WORLD) -> Iterator[Callable[..., list[Any]]]:
    """Give a function that runs (function, *args) on all ranks and returns what each returned."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Spawned, since a fork of a process that has used threads may hang.
    context = multiprocessing.get_context("spawn")
    pools = [
        ProcessPoolExecutor(1, context, initializer=_become, initargs=(rank, world, port))
        for rank in range(world)
    ]

    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        with TemporaryDirectory() as folder:
            call = partial(_in_a_group, f"file://{folder}/store", function, *args, **kwargs)
            futures = [pool.submit(call) for pool in pools]
            return [future.result(timeout=180) for future in futures]

    try:
        yield run
    finally:
        for pool in pools:
            pool.shutdown(wait=True, cancel_futures=True)


def _become(rank: int, world: int, port: int) -> None:
    """Become one of the ranks, with the environment that torchrun gives."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",
    }


def _end_with_parent() -> None:
    """End at once when the parent has ended: gloo would go on waiting for other ranks."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _in_a_group(place: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `function` in a process group of its own: each group that a test leaves has threads."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # A rank that waits for one that failed must not wait long.
    dist.init_process_group(
        "gloo", init_method=place, rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    try:
        dist.barrier()  # a rank that ends while another one still connects makes that one fail
        return function(*args, **kwargs)
    finally:
        dist.destroy_process_group()
        for cached in _caches(len(sys.modules)):
            cached.cache_clear()
        gc.collect()


@lru_cache(maxsize=1)
def _caches(num_modules: int) -> list[Any]:
    """Find the caches of torch that keep meshes, and so groups: the threads of each group poll."""
    del num_modules  # a module that is imported later may have further ones
    return [
        one
        for one in gc.get_objects()
        # isinstance() would ask the object that a weak proxy stands for, which may be gone.
        if type(one) is type(_caches) and str(one.__module__).startswith("torch.distributed")
    ]


def average(tensors):
    for tensor in tensors:
        dist.all_reduce(tensor)
        tensor /= WORLD
