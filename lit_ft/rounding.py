"""Stochastic rounding to bfloat16, with random bits that a resumed or cut run repeats."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

log = logging.getLogger(__name__)


def round_stochastically(x: Tensor, *, generator: torch.Generator) -> Tensor:
    """Round float32 `x` to one of its two bfloat16 neighbours, with expectation `x`.

    A bfloat16 is the upper half of a float32: adding a uniform 16-bit integer to the lower half
    carries into the upper with the probability of the remainder, the rest is cut off. Values that
    bfloat16 holds, infinities and NaN stay what they are; finite values beyond the largest
    bfloat16 become that one, never infinite.

    Args:
        x: float32 tensor of any shape.
        generator: Source of the random bits, on `x`'s device.

    Returns:
        bfloat16 tensor of `x`'s shape.
    """
    assert x.dtype is torch.float32
    return round_with(x, random_bits(x.shape, x.device, generator=generator))


def random_bits(
    shape: Sequence[int], device: torch.device, *, generator: torch.Generator
) -> Tensor:
    """Return uniform 16-bit integers, as int32; `generator` is of `device`."""
    bits = torch.empty(shape, dtype=torch.int32, device=device)
    return bits.random_(0, 1 << 16, generator=generator)


def round_with(x: Tensor, bits: Tensor) -> Tensor:
    """As `round_stochastically`, with `random_bits` of `x`'s shape at hand."""
    # In one row: else each number of dimensions, and square matrices, would be other graphs.
    return _kernel(x.device)(x.detach().reshape(-1), bits.reshape(-1)).view(x.shape)


def _rounded(x: Tensor, bits: Tensor) -> Tensor:
    largest = torch.finfo(torch.bfloat16).max
    raised = x.clamp(-largest, largest).view(torch.int32) + bits
    rounded = (raised & -(1 << 16)).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


@cache
def _kernel(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Return `_rounded`, as one kernel on a GPU, which else reads and writes for each operation."""
    if device.type != "cuda":
        return _rounded
    compiled = torch.compile(_rounded, dynamic=True, fullgraph=True)
    x = torch.zeros(8, device=device)
    try:
        compiled(x, x.int())
    except Exception as error:  # no C compiler on the machine, no Triton for the GPU, ...
        log.warning(
            "torch.compile does not work here (%s): bfloat16 weights are rounded by many small "
            "kernels, which takes longer.",
            str(error).strip().partition("\n")[0],
        )
        return _rounded
    return compiled


def own_gpu() -> list[int]:
    """Return this process's GPU, for `torch.random.fork_rng`, which else takes all and warns."""
    return [torch.cuda.current_device()] if torch.cuda.is_available() else []


def keyed_generator(device: torch.device, *key: int) -> torch.Generator:
    """Return a generator that depends on `key` alone, such as (seed, step, layer)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))
