"""Settings of torch.compile for a backward pass that runs twice over one graph."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.compiler.config


@contextmanager
def compiled_for_two_backward_passes() -> Iterator[None]:
    """Make code that is compiled in the block keep its saved tensors for a second backward pass.

    In backward, compiled code overwrites the tensors that it saved ("donated buffers"). This
    function switches that off, which also switches off torch's check against a second pass. A graph
    that was compiled earlier does not record the setting, neither in memory nor in torch's cache on
    disk: a second pass over it would silently give wrong gradients. So graphs in memory are
    discarded, and graphs compiled in the block get a cache key of their own on disk.

    The settings apply to all code, because a step may also compile parts that no module reveals,
    such as a loss function or flex attention.
    """
    functorch, compiler = torch._functorch.config, torch.compiler.config
    before = functorch.donated_buffer, compiler.cache_key_tag
    functorch.donated_buffer = False
    compiler.cache_key_tag = f"{compiler.cache_key_tag}two-backward-passes"
    if "torch._dynamo" in sys.modules:  # else nothing has been compiled
        torch.compiler.reset()
    try:
        yield
    finally:
        functorch.donated_buffer, compiler.cache_key_tag = before
