"""The rank of a process, and its share of the data."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only


def process_rank() -> int:
    """Return the rank of this process among all of the run, as its launcher has set it; 0 alone."""
    rank: int = getattr(rank_zero_only, "rank", 0)
    return rank


def data_parallel_rank(trainer: Trainer) -> tuple[int, int]:
    """Return the index of this rank's share of the data, and the number of shares.

    Each rank has its own share, except under tensor parallelism: ranks that compute parts of the
    same layers get the same share.
    """
    dealt = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
    return dealt["rank"], dealt["num_replicas"]
