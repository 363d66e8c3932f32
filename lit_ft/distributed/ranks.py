"""Which rank of the data-parallel ones a process is."""

from __future__ import annotations

from lightning.pytorch import Trainer


def data_parallel_rank(trainer: Trainer) -> tuple[int, int]:
    """Return which share of the data this rank gets, and of how many.

    There is one for each rank, but where ranks compute parts of the same layers (tensor
    parallelism): those get the same.
    """
    dealt = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
    return dealt["rank"], dealt["num_replicas"]
