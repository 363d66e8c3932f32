"""Stochastic rounding to bfloat16, with random bits that a resumed or sharded run repeats."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

log = logging.getLogger(__name__)


def round_stochastically(x: Tensor, *, generator: torch.Generator) -> Tensor:
    """Round float32 `x` to one of its two bfloat16 neighbours, with expectation `x`.

    A bfloat16 is the upper half of a float32. A uniform random 16-bit integer is added to the lower
    half, and the lower half is then cut off. The larger the lower half was, the more likely the
    addition carries into the upper half, so that the expectation is exact. Values that bfloat16 can
    represent, infinities and NaN do not change. Finite values beyond the largest bfloat16 become
    the largest bfloat16, never infinity. See Gupta et al., arXiv:1502.02551.

    Args:
        x: The float32 tensor to round, of any shape.
        generator: The source of the random bits, on the device of `x`.

    Returns:
        A bfloat16 tensor of the shape of `x`.
    """
    assert x.dtype is torch.float32
    return round_with(x, random_bits(x.shape, x.device, generator=generator))


def random_bits(
    shape: Sequence[int], device: torch.device, *, generator: torch.Generator
) -> Tensor:
    """Return uniform 16-bit integers of `shape`, as int32; `generator` must be on `device`."""
    bits = torch.empty(shape, dtype=torch.int32, device=device)
    return bits.random_(0, 1 << 16, generator=generator)


def round_with(x: Tensor, bits: Tensor) -> Tensor:
    """Round float32 `x` as `round_stochastically` does, with `bits` from `random_bits`."""
    return _in_one_kernel(_rounded, x.detach(), bits)


def round_moved(weight: Tensor, step: Tensor, bits: Tensor, *, keep: float) -> Tensor:
    """Return `keep` · `weight` + `step`, summed in float32 and rounded as `round_with` does.

    Args:
        weight: The bfloat16 weight, of any shape.
        step: The float32 step, of the shape of `weight`.
        bits: Random bits from `random_bits`, of the shape of `weight`.
        keep: The factor that multiplies the weight, such as 1 − decay.
    """
    # A tensor on the host: a number would be compiled in, and `keep` changes with the rate.
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
    """Apply an elementwise operation to tensors of one shape, in one kernel if that compiles."""
    shape = tensors[0].shape
    # Flattened, since each number of dimensions, and square matrices, would be compiled again.
    rows = [tensor.reshape(-1) if tensor.ndim else tensor for tensor in tensors]
    if tensors[0].is_cuda:
        if is_fake(tensors[0]):  # only its result takes memory, and there is nothing to compute
            return tensors[0].new_empty(shape, dtype=torch.bfloat16)
        if _compiles(tensors[0].device):
            operation = _compiled(operation)
    return operation(*rows).view(shape)


@cache
def _compiled(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(operation, dynamic=True, fullgraph=True)


@cache
def _compiles(device: torch.device) -> bool:
    # A kernel's blocks suit the size that it is first compiled for. Blocks for 8 elements took 25
    # times as long as the memory traffic (benchmarks/results/optimizer_step_cuda.json).
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
    """Return this process's GPU as a list, empty without one, for `torch.random.fork_rng`."""
    return [torch.cuda.current_device()] if torch.cuda.is_available() else []


def keyed_generator(device: torch.device, *key: int) -> torch.Generator:
    """Return a generator on `device` that depends on `key` alone, such as (seed, step, layer)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))
