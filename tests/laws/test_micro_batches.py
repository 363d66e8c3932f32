"""Micro-batches of any sizes are one batch of the same rows."""

import torch

from tests.support.tiny_module import (
    batch_of,
    rows,
    weights_after,
)


def test_unequal_micro_batches_equal_one_batch(tmp_path):
    first, second = batch_of([12, 3, 9, 4, 12, 2], seed=1), batch_of([5, 5, 5, 12, 8, 3], seed=2)
    whole = weights_after(tmp_path, [first, second])
    cut = [rows(b, *span) for b in (first, second) for span in ((0, 1), (1, 4), (4, 6))]
    # The last window of an epoch may be short: 4 micro-batches in windows of 3 and 1.
    for micro_batches in (cut, [*cut[:3], second]):
        accumulated = weights_after(tmp_path, micro_batches, accumulate_grad_batches=3)
        for name, weight in whole.items():
            torch.testing.assert_close(accumulated[name], weight, rtol=1e-5, atol=1e-6)
