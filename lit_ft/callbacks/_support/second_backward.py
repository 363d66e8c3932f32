"""Settings of torch.compile for a backward pass that runs twice over one graph."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.compiler.config


@contextmanager
def compiled_for_two_backward_passes() -> Iterator[None]:
    """Let code that is compiled in the block keep its saved tensors for a second backward pass.

    Compiled code overwrites the tensors that it saved for backward ("donated" buffers). The switch
    that prevents this also turns off torch's check. Neither the graphs in memory nor those in
    torch's cache on disk record how they were compiled, so the second pass of an older graph would
    silently give wrong gradients. Graphs in memory are therefore discarded, and those on disk get
    their own cache key.

    A step may compile something (a loss function, flex attention) that no module announces, so the
    settings apply to every module.
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
