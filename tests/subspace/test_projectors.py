"""Rules that move a basis, on basis_input that says little: few tokens, nothing, or no numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_ft.subspace.projectors import SVD, BasisInput, Oja, Online, SubspaceIteration
from lit_ft.subspace.projectors.base import principal_rows

ORTHONORMAL = [Oja(every=1), Oja(step_size=10.0, every=1), SubspaceIteration(), SVD()]
GENERATOR = torch.Generator()


def basis_and_gradient(seed, num_tokens, rank=6, rows=9, cols=20):
    torch.manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(cols, rank).double()).Q.T
    return basis, torch.randn(rows, num_tokens).double() @ torch.randn(num_tokens, cols).double()


def move(rule, basis, gradient):
    basis_input = (
        gradient if rule.basis_input is BasisInput.GRADIENT else basis @ gradient.T @ gradient
    )
    return rule.move(basis, basis_input, state={}, decay=1.0, generator=GENERATOR)


@pytest.mark.parametrize("rule", ORTHONORMAL)
@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), num_tokens=st.integers(0, 9))
def test_orthonormal_bases_stay_so_whatever_the_rank_of_the_gradient(rule, seed, num_tokens):
    basis, gradient = basis_and_gradient(seed, num_tokens)
    moved = move(rule, basis, gradient)
    torch.testing.assert_close(moved @ moved.T, torch.eye(len(basis)).double())


@pytest.mark.parametrize("rule", [Oja(every=1), SubspaceIteration()])
def test_what_few_tokens_do_not_decide_is_not_left_to_round_off(rule):
    basis, gradient = basis_and_gradient(0, num_tokens=2)
    other = gradient + 1e-15 * torch.randn(gradient.shape).double()  # another order of summation
    torch.testing.assert_close(
        move(rule, basis, gradient), move(rule, basis, other), rtol=0, atol=1e-6
    )


def test_power_iteration_finds_the_gradients_own_directions():
    basis, gradient = basis_and_gradient(0, num_tokens=2)
    moved = move(SubspaceIteration(), basis, gradient)
    torch.testing.assert_close(gradient @ moved.T @ moved, gradient)


@pytest.mark.parametrize("seed", range(10))  # named: an unlucky start takes more rounds
def test_power_iteration_takes_each_row_to_a_singular_vector(seed):
    # AdamW weighs the coordinates one by one: in a mixture of them it learns far less.
    basis, _ = basis_and_gradient(seed, 1)
    own = torch.linalg.qr(torch.randn(20, 20).double()).Q.T
    gradient = torch.diag(0.6 ** torch.arange(20.0).double()) @ own
    for _ in range(8):
        basis = move(SubspaceIteration(), basis, gradient)
    energies = (gradient @ basis.T).square().sum(0)
    assert (energies[:-1] > energies[1:]).all()
    gram = basis @ gradient.T @ gradient @ basis.T
    beside = (gram - gram.diag().diag()).abs()
    assert (beside <= 1e-4 * torch.outer(energies, energies).sqrt()).all()
    assert (basis @ own.T).diag()[:3].abs().min() > 0.999


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_principal_rows_that_are_so_already_stay_with_their_signs(seed):
    rows, _ = basis_and_gradient(seed, 1)
    scaled = torch.arange(len(rows), 0, -1)[:, None] * rows
    torch.testing.assert_close(principal_rows(scaled), rows)


@pytest.mark.parametrize("value", [0.0, torch.inf, torch.nan])
@pytest.mark.parametrize("rule", [Oja(every=1), Online(), SubspaceIteration()])
def test_a_sketch_that_says_nothing_leaves_the_basis(rule, value):
    basis, _ = basis_and_gradient(0, 1)
    sketch = torch.full_like(basis, value)
    moved = rule.move(basis, sketch, state={}, decay=1.0, generator=GENERATOR)
    assert torch.equal(moved, basis)
