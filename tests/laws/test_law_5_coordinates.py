"""Law 5: other coordinates of the same span leave the moments what they are."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_ft.subspace.moments import change_of_basis, rotated


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 5), rank=st.integers(1, 5))
def test_other_coordinates_of_the_same_span_leave_the_momentum_alone(seed, rows, rank):
    """Law 5: the lifted momentum exactly, the squares where they have one value a row."""
    torch.manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(8, rank).double()).Q.T
    turn = torch.linalg.qr(torch.randn(rank, rank).double()).Q
    mean = torch.randn(rows, rank).double()
    square = mean.square() + torch.rand(rows, 1).double()
    rotation = change_of_basis(basis, turn @ basis)
    torch.testing.assert_close(rotation, turn.T)
    new_mean, new_square = rotated(mean, square, rotation)
    torch.testing.assert_close(new_mean @ (turn @ basis), mean @ basis)
    torch.testing.assert_close(new_square - new_mean.square(), square - mean.square())
