"""Measured memory against memory that the test itself takes and gives back."""

from __future__ import annotations

import mmap

import bitsandbytes as bnb
import torch
from torch import nn

from lit_ft.measure import (
    current_bytes,
    peak_bytes,
    reset_peak,
    weight_bytes,
)
from lit_ft.measure import memory as tracker

MIB = 2**20


def touched(size: int) -> mmap.mmap:
    # Straight from the kernel: malloc may hand out what another test left resident.
    block = mmap.mmap(-1, size)
    for _ in range(size // MIB):
        block.write(bytes(MIB))
    return block


def test_peak_remembers_memory_that_was_given_back_until_it_is_reset():
    assert reset_peak()
    before = peak_bytes()
    touched(256 * MIB).close()
    assert peak_bytes().value - before.value > 200 * MIB
    assert peak_bytes().source == current_bytes().source == "process_rss"
    assert reset_peak()
    assert peak_bytes().value - before.value < 100 * MIB


def test_current_follows_memory_down():
    before = current_bytes().value
    block = touched(256 * MIB)
    during = current_bytes().value
    block.close()
    assert during - before > 200 * MIB
    assert during - current_bytes().value > 200 * MIB


def test_without_proc_the_peak_is_that_of_the_whole_life(monkeypatch, tmp_path):
    true_peak = peak_bytes().value
    monkeypatch.setattr(tracker, "_STATUS", tmp_path / "missing")
    monkeypatch.setattr(tracker, "_CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    assert peak_bytes().value >= true_peak - MIB  # in bytes: ru_maxrss is in KiB on Linux
    assert peak_bytes().value < 100 * true_peak
    assert not reset_peak()


def test_tied_weights_count_once_and_views_as_what_they_look_into():
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16, bias=False))
    assert weight_bytes(model) == 2 * 16 * 8 * 4
    model[1].weight = model[0].weight
    assert weight_bytes(model) == 16 * 8 * 4
    model[1].weight = nn.Parameter(model[0].weight.data[:4])
    assert weight_bytes(model) == 16 * 8 * 4


def test_only_persistent_buffers_are_weights():
    model = nn.Linear(8, 8, bias=False)
    model.register_buffer("packed", torch.zeros(3, dtype=torch.uint8))
    model.register_buffer("cache", torch.zeros(1000), persistent=False)
    assert weight_bytes(model) == 8 * 8 * 4 + 3


def test_four_bit_weights_count_packed_with_their_scales():
    layer = bnb.nn.Linear4bit(128, 128, bias=False, quant_type="nf4").to("cpu")
    blocks = 128 * 128 // layer.weight.quant_state.blocksize
    code = 16 * 4
    scales = layer.weight.quant_state.absmax
    nested = layer.weight.quant_state.state2
    expected = 128 * 128 // 2 + code + scales.numel() * scales.element_size()
    if nested is not None:
        expected += (nested.absmax.numel() + nested.code.numel()) * 4
        expected += layer.weight.quant_state.offset.element_size()
    assert scales.numel() == blocks
    assert weight_bytes(layer) == expected
