"""SinkGD is its paper's: rows and columns of the gradient scaled in turn."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_ft.optim import SinkGD


def sr_sinkhorn(gradient: Tensor, iterations: int) -> Tensor:
    """Algorithm 3, line by line: X ← √n Q(X)⁻¹ X, then X ← √m X R(X)⁻¹."""
    x = gradient.clone()
    m, n = x.shape
    for _ in range(iterations):
        of_rows = torch.diag(torch.stack([row.dot(row).sqrt() for row in x]))
        x = n**0.5 * torch.linalg.solve(of_rows, x)
        of_columns = torch.diag(torch.stack([column.dot(column).sqrt() for column in x.T]))
        x = m**0.5 * torch.linalg.solve(of_columns, x, left=False)
    return x


@settings(max_examples=30)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    iterations=st.integers(1, 6),
    seed=st.integers(0, 10**6),
)
def test_updates_are_those_of_the_paper(
    rows: int, columns: int, iterations: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    gradient *= 10 ** torch.randn(rows, 1, generator=generator, dtype=torch.float64)
    weight = torch.nn.Parameter(torch.zeros(rows, columns, dtype=torch.float64))
    weight.grad = gradient.clone()
    SinkGD([weight], lr=0.5, scale=0.2, iterations=iterations).step()
    expected = -0.1 * sr_sinkhorn(gradient, iterations)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-10, atol=1e-10)


def test_the_update_has_rows_and_columns_of_one_size() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(40, 30))
    weight.grad = torch.randn(40, 30, generator=generator) * 10 ** torch.randn(40, 1)
    SinkGD([weight], lr=1.0, iterations=30).step()
    squares = weight.detach().square()
    torch.testing.assert_close(squares.mean(0), torch.ones(30), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(squares.mean(1), torch.ones(40), rtol=1e-2, atol=1e-2)


def test_a_stack_is_stepped_matrix_by_matrix() -> None:
    gradient = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0))
    stack = torch.nn.Parameter(torch.zeros(5, 4, 6))
    matrices = [torch.nn.Parameter(torch.zeros(4, 6)) for _ in range(5)]
    stack.grad = gradient.clone()
    for matrix, own in zip(matrices, gradient, strict=True):
        matrix.grad = own.clone()
    SinkGD([stack]).step()
    SinkGD(matrices).step()
    torch.testing.assert_close(stack.detach(), torch.stack(matrices).detach())


def test_matrices_have_no_state() -> None:
    weight, vector = torch.nn.Parameter(torch.ones(4, 3)), torch.nn.Parameter(torch.ones(3))
    optimizer = SinkGD([weight, vector])
    weight.grad, vector.grad = torch.ones(4, 3), torch.ones(3)
    optimizer.step()
    assert set(optimizer.state) == {vector}
