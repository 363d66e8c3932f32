"""SCALE is its paper's: normalised gradients, and a running mean where one is asked for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_ft.optim import Scale


def reference(gradients: list[Tensor], *, rate: float, momentum: float, by_column: bool) -> Tensor:
    """The sum of the updates of a matrix [m, n], as algorithm 1 takes them, row by row."""
    mean = torch.zeros_like(gradients[0])
    moved = torch.zeros_like(gradients[0])
    for gradient in gradients:
        mean = momentum * mean + (1 - momentum) * gradient
        lines = mean.T if by_column else mean
        unit = torch.stack([line / (line.dot(line) / len(line)) ** 0.5 for line in lines])
        moved -= rate * (unit.T if by_column else unit)
    return moved


@settings(max_examples=30)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    by_column=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_updates_are_those_of_the_paper(
    rows: int, columns: int, momentum: float, by_column: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradients = list(torch.randn(4, rows, columns, generator=generator, dtype=torch.float64))
    weight = torch.nn.Parameter(torch.zeros(rows, columns, dtype=torch.float64))
    optimizer = Scale([weight], lr=0.1, momentum=momentum, dim=-2 if by_column else -1)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    expected = reference(gradients, rate=0.1, momentum=momentum, by_column=by_column)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dim", [-1, -2])
def test_a_stack_is_stepped_matrix_by_matrix(dim: int) -> None:
    gradients = torch.randn(3, 5, 4, 6, generator=torch.Generator().manual_seed(0))
    stack = torch.nn.Parameter(torch.zeros(5, 4, 6))
    matrices = [torch.nn.Parameter(torch.zeros(4, 6)) for _ in range(5)]
    together = Scale([stack], lr=0.1, momentum=0.9, dim=dim)
    apart = Scale(matrices, lr=0.1, momentum=0.9, dim=dim)
    for gradient in gradients:
        stack.grad = gradient.clone()
        for matrix, own in zip(matrices, gradient, strict=True):
            matrix.grad = own.clone()
        together.step()
        apart.step()
    torch.testing.assert_close(stack.detach(), torch.stack(matrices).detach())


def test_only_a_momentum_has_state() -> None:
    weights = [torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2)]
    optimizer = Scale([{"params": weights[:1]}, {"params": weights[1:], "momentum": 0.9}])
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert {w: set(optimizer.state[w]) for w in weights} == {
        weights[0]: set(),
        weights[1]: {"momentum_buffer"},
    }


def test_gradients_below_the_smallest_take_smaller_steps() -> None:
    weight = torch.nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))
    weight.grad = torch.tensor([[1.0, 1, 1], [1e-10, 1e-10, 1e-10]], dtype=torch.float64)
    Scale([weight], lr=1.0).step()
    torch.testing.assert_close(weight[:, 0].detach(), torch.tensor([-1.0, -1e-2]).double())
