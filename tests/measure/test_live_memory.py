"""The tracker of live tensors: what it counts, and when it stops counting it."""

from __future__ import annotations

import gc
import inspect

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_ft.measure.live_memory import GRADIENTS, MemoryTracker, Place
from lit_ft.measure.memory_peaks import peaks_of
from tests.support.allocations import PeakAllocated


def live(tracker: MemoryTracker) -> int:
    return sum(e.storage.bytes if e.allocates else -e.storage.bytes for e in tracker.events)


def peak(tracker: MemoryTracker) -> int:
    return round(sum(peaks_of(tracker.events, 0).highest[1]))


def test_views_count_once_and_what_is_gone_does_not_count():
    with MemoryTracker() as tracker:
        kept = torch.zeros(10)
        views = [kept[2:], kept.view(2, 5), kept[None].mT]
        torch.zeros(1000)
    gc.collect()
    assert len(views) == 3
    assert live(tracker) == 40
    assert peak(tracker) == 4040


def test_saved_tensors_count_until_backward_frees_them():
    weight = torch.zeros(8, 8, requires_grad=True)
    with MemoryTracker() as tracker:
        loss = (weight @ weight).exp().sum()
        held = live(tracker)
        loss.backward()
        del loss
        gc.collect()
    assert held == 256 + 4  # the exponential, which backward needs, and the sum
    assert live(tracker) == 256  # the gradient
    assert weight.grad is not None


def test_memory_is_given_out_in_granules():
    with MemoryTracker(granule=512) as tracker:
        kept = [torch.zeros(1), torch.zeros(129)]
    assert live(tracker) == 512 + 1024
    assert len(kept) == 2


def two_allocations():
    torch.ones(100) + 1  # the first one is there meanwhile
    line = inspect.currentframe().f_lineno - 1
    return line


def test_a_peak_names_the_code_that_allocates():
    with MemoryTracker(keeps_stacks=True) as tracker:
        torch.ones(10)
        line = two_allocations()
    [(operation, innermost, caller)] = [at[:3] for at in peaks_of(tracker.events, 0).at.values()]
    assert operation == "aten.add.Tensor"
    assert innermost == f"two_allocations, test_live_memory.py:{line}"
    assert caller.startswith("test_a_peak_names_the_code_that_allocates, test_live_memory.py:")


def test_a_resized_storage_counts_with_its_new_size():
    with MemoryTracker() as tracker:
        tensor = torch.zeros(100)
        tensor.untyped_storage().resize_(40)
        tensor[:10].zero_()
        assert live(tracker) == 40


def test_a_mark_says_what_is_there_already():
    tensor = torch.zeros(4)
    with MemoryTracker() as tracker:
        tracker.place = Place("step")
        tracker.mark([tensor], GRADIENTS)
    assert tracker.events[0].storage.category == GRADIENTS
    assert live(tracker) == 16


@settings(max_examples=30, deadline=None)
@given(widths=st.lists(st.integers(1, 400), min_size=1, max_size=5), rows=st.integers(1, 50))
def test_the_peak_is_that_of_torchs_own_allocator(widths, rows):
    def work() -> None:
        shapes = zip([7, *widths], widths, strict=False)
        layers = [torch.ones(*shape, requires_grad=True) for shape in shapes]
        x = torch.ones(rows, 7)
        for layer in layers:
            x = (x @ layer).tanh() * 2
        x.sum().backward()

    work()  # what is made at a first call alone
    with PeakAllocated() as true:
        work()
    with MemoryTracker() as tracker:
        work()
    assert abs(peak(tracker) - true.bytes) <= 0.02 * true.bytes + 64


def test_gradients_add_up_in_the_memory_of_the_first():
    def train():
        weight = torch.zeros(100, 100, requires_grad=True)
        (weight.sin() + weight.cos() + weight.exp()).sum().backward()

    train()  # torch allocates more in its first backward pass
    with PeakAllocated() as true:
        train()
    with MemoryTracker() as tracker:
        train()
    assert peak(tracker) == true.bytes
