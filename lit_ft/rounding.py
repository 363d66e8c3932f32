"""Stochastic rounding to bfloat16, with random bits that a resumed or cut run repeats."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


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
    largest = torch.finfo(torch.bfloat16).max
    bits = x.clamp(-largest, largest).view(torch.int32)
    noise = torch.empty_like(bits).random_(0, 1 << 16, generator=generator)
    rounded = noise.add_(bits).bitwise_and_(-1 << 16).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


def own_gpu() -> list[int]:
    """Return this process's GPU, for `torch.random.fork_rng`, which else takes all and warns."""
    return [torch.cuda.current_device()] if torch.cuda.is_available() else []


def keyed_generator(device: torch.device, *key: int) -> torch.Generator:
    """Return a generator that depends on `key` alone, such as (seed, step, layer)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))
