"""What torch.compile has to know where backward runs twice over one graph."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.compiler.config


@contextmanager
def compiled_for_two_backward_passes() -> Iterator[None]:
    """Let what is compiled in the block keep its saved tensors for a second backward pass.

    Compiled code overwrites what it has saved for backward ("donated" buffers). The switch against
    that turns off torch's check as well, and neither graphs in memory nor those of torch's cache on
    disk say how they were compiled: the second pass of an older graph would give wrong gradients
    without a word. So graphs in memory are forgotten, and those on disk get a mark of their own.

    Whether a step compiles anything (a loss function, flex attention) shows when it does. So this
    asks no module.
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
