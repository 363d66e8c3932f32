"""Seconds that a new basis of one matrix takes: subspace iteration, and galore-torch's SVD."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from galore_torch.galore_projector import GaLoreProjector

from lit_ft.subspace.layers.products import projected_gradient_and_sketch
from lit_ft.subspace.projectors import SubspaceIteration
from support.timing import now


def measure_refresh(
    device: torch.device, rows: int = 2048, cols: int = 5632, rank: int = 128, tokens: int = 1024
) -> dict[str, float]:
    """Return the seconds that a new basis adds to a step, for one matrix; medians of three.

    galore-torch decomposes the gradient, which it has anyway. Subspace iteration makes a sketch of
    it from the layer's inputs and output gradients; the sketch counts.
    """
    with torch.device(device):
        x, y = torch.randn(2, tokens // 2, cols), torch.randn(2, tokens // 2, rows)
        basis = torch.linalg.qr(torch.randn(cols, rank)).Q.T.contiguous()
    gradient = y.flatten(0, 1).T @ x.flatten(0, 1)
    rule, generator = SubspaceIteration(), torch.Generator(device)
    svd = GaLoreProjector(rank, proj_type="right")

    def iterate() -> None:
        _, sketch = projected_gradient_and_sketch(y, x, x @ basis.T)
        rule.move(basis, sketch, state={}, decay=1.0, generator=generator)

    def decompose() -> None:
        svd.get_orthogonal_matrix(gradient, rank, type="right")

    return {
        "galore-torch SVD": _median(decompose, device),
        "subspace iteration": _median(iterate, device),
    }


def _median(function: Callable[[], None], device: torch.device, times: int = 3) -> float:
    if device.type == "cuda":
        function()  # the first call loads libraries
    seconds = []
    for _ in range(times):
        began = now(device)
        function()
        seconds.append(now(device) - began)
    return statistics.median(seconds)
