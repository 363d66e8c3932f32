"""Packing: put whole examples into rows of bounded length, wasting as little as possible."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Pack examples into bins by best-fit decreasing.

    Each example goes, longest first, into the fullest bin that still has space for it. The result
    has at most 11/9 of the fewest possible bins, plus 4 (Johnson et al., 1974,
    doi:10.1137/0203025), and depends only on the arguments. Indices ascend within a bin, and bins
    ascend by their first index, so that packing stays close to the order of the data. Packing
    takes O(n log n) time.

    Args:
        lengths: The number of tokens of each example, [examples].
        max_length: The largest number of tokens in a bin.

    Returns:
        The example indices of each bin; every example occurs exactly once.

    Raises:
        ValueError: If an example is longer than `max_length`.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size and sizes.max() > max_length:
        longest = int(sizes.argmax())
        raise ValueError(
            f"Example {longest} has {sizes[longest]} tokens, more than max_length={max_length}: "
            "truncate it before packing, or raise max_length."
        )
    bins: list[list[int]] = []
    bins_by_space: dict[int, list[list[int]]] = {}
    spaces: list[int] = []  # the keys of bins_by_space, ascending
    longest_first = np.argsort(-sizes, kind="stable")
    for index, size in zip(longest_first.tolist(), sizes[longest_first].tolist(), strict=True):
        place = bisect_left(spaces, size)
        if place == len(spaces):
            space = max_length
            target: list[int] = []
            bins.append(target)
        else:
            space = spaces[place]
            target = bins_by_space[space].pop()
            if not bins_by_space[space]:
                del bins_by_space[space], spaces[place]
        target.append(index)
        space -= size
        if space in bins_by_space:
            bins_by_space[space].append(target)
        else:
            bins_by_space[space] = [target]
            insort(spaces, space)
    for indices in bins:
        indices.sort()
    bins.sort()
    return bins
