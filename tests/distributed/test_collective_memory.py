"""What gloo's collectives allocate for themselves, as the memory plan counts it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from lit_ft.measure import kernel_temporaries
from lit_ft.measure.live_memory import MemoryTracker
from lit_ft.measure.memory_peaks import peaks_of
from tests.support.allocations import peak_allocated
from tests.support.ranks import WORLD


def gather():
    part, whole = torch.zeros(1000), torch.zeros(WORLD * 1000)
    dist.all_gather_into_tensor(whole, part)


def reduce_scatter():
    part, whole = torch.zeros(1000), torch.zeros(WORLD * 1000)
    dist.reduce_scatter_tensor(part, whole)


def true_and_counted():
    found = []
    for collective in (gather, reduce_scatter):
        with MemoryTracker(temporaries=kernel_temporaries.on_cpu) as tracker:
            collective()
        counted = sum(peaks_of(tracker.events, 0).highest[1])
        found.append((peak_allocated(collective), counted))
    return found


@pytest.mark.process
def test_copies_of_collectives_count(on_both):
    for rank in on_both(true_and_counted):
        for true, counted in rank:
            assert true == counted
