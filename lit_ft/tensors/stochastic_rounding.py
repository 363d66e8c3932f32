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
    return _in_one_kernel(_rounded, x.detach(), bits)


def round_moved(weight: Tensor, step: Tensor, bits: Tensor, *, keep: float) -> Tensor:
    """Return `keep` · `weight` + `step`, summed in float32 and rounded as `round_with` does.

    Args:
        weight: bfloat16.
        step: float32, of `weight`'s shape.
        bits: `random_bits` of that shape.
        keep: A factor, such as 1 − decay.
    """
    # A tensor on the host: a number would be compiled in, and change with the learning rate.
    factor = torch.tensor(keep, device="cpu")
    return _in_one_kernel(_moved_and_rounded, weight, step, bits, factor)


def _rounded(x: Tensor, bits: Tensor) -> Tensor:
    largest = torch.finfo(torch.bfloat16).max
    raised = x.clamp(-largest, largest).view(torch.int32) + bits
    rounded = (raised & -(1 << 16)).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


def _moved_and_rounded(weight: Tensor, step: Tensor, bits: Tensor, keep: Tensor) -> Tensor:
    return _rounded(weight.float() * keep + step, bits)


def _in_one_kernel(operation: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Apply an elementwise operation; on a GPU without reading and writing for each part of it."""
    shape = tensors[0].shape
    # In one row: else each number of dimensions, and square matrices, would be other graphs.
    rows = [tensor.reshape(-1) if tensor.ndim else tensor for tensor in tensors]
    if tensors[0].is_cuda and _compiles(tensors[0].device):
        operation = _compiled(operation)
    return operation(*rows).view(shape)


@cache
def _compiled(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(operation, dynamic=True, fullgraph=True)


@cache
def _compiles(device: torch.device) -> bool:
    # A kernel's blocks are made for the size that it is first compiled on: those for 8 elements
    # took 25 times as long as the memory did (benchmarks/results/optimizer_step_cuda.json).
    x = torch.zeros(2**20, device=device)
    bits = x.int()
    try:
        _compiled(_rounded)(x, bits)
        _compiled(_moved_and_rounded)(x.bfloat16(), x, bits, torch.tensor(1.0, device="cpu"))
    except Exception as error:  # no C compiler on the machine, no Triton for the GPU, ...
        log.warning(
            "torch.compile does not work here (%s): bfloat16 weights are rounded by many small "
            "kernels, which takes longer.",
            str(error).strip().partition("\n")[0],
        )
        return False
    return True


def own_gpu() -> list[int]:
    """Return this process's GPU, for `torch.random.fork_rng`, which else takes all and warns."""
    return [torch.cuda.current_device()] if torch.cuda.is_available() else []


def keyed_generator(device: torch.device, *key: int) -> torch.Generator:
    """Return a generator that depends on `key` alone, such as (seed, step, layer)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))
