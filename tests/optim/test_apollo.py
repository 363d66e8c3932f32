"""APOLLO is its paper's: AdamW's sizes of steps from a random subspace, on the gradient itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_ft.optim import Apollo


def reference(
    gradients: list[Tensor],
    projections: list[Tensor],
    *,
    rate: float,
    scale: float,
    per: str,
    growth: float,
) -> Tensor:
    """The sum of the updates of a matrix, as algorithm 1 takes them, channel by channel."""
    wide = gradients[0].shape[0] < gradients[0].shape[1]
    moved = torch.zeros_like(gradients[0])
    first: Tensor | float = 0.0
    second: Tensor | float = 0.0
    last = 0.0
    for t, (gradient, projection) in enumerate(zip(gradients, projections, strict=True), start=1):
        # Channels as rows, so that one projection suits both shapes.
        channels = gradient.T if wide else gradient
        seen = channels @ projection.T
        first = 0.9 * first + 0.1 * seen
        second = 0.999 * second + 0.001 * seen**2
        adapted = first / (second**0.5 + 1e-8)
        if per == "tensor":
            scaled = channels * (float(adapted.norm()) / (float(seen.norm()) + 1e-8))
        else:
            factors = [
                float(a.norm()) / (float(s.norm()) + 1e-8)
                for a, s in zip(adapted, seen, strict=True)
            ]
            scaled = torch.stack([f * row for f, row in zip(factors, channels, strict=True)])
        norm = float(scaled.norm())
        if last and norm / (last + 1e-8) > growth:
            scaled = scaled * growth * (last + 1e-8) / norm
        last = float(scaled.norm())
        step = rate * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t)
        moved -= step * scale * (scaled.T if wide else scaled)
    return moved


@settings(max_examples=40)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    rank=st.integers(1, 12),
    per=st.sampled_from(["channel", "tensor"]),
    every=st.integers(1, 7),
    growth=st.sampled_from([1.01, 1.5]),
    seed=st.integers(0, 10**6),
)
def test_updates_are_those_of_the_paper(
    rows: int, columns: int, rank: int, per: str, every: int, growth: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradients = list(torch.randn(6, rows, columns, generator=generator, dtype=torch.float64))
    weight = torch.nn.Parameter(torch.zeros(rows, columns, dtype=torch.float64))
    optimizer = Apollo(
        [weight], 0.1, rank=rank, scale=3.0, per=per, refresh_every=every, growth=growth, seed=seed
    )
    projections = []
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
        [(_, projection)] = optimizer._projections.values()
        projections.append(projection)
    assert len({id(p) for p in projections}) == -(-6 // every)
    expected = reference(gradients, projections, rate=0.1, scale=3.0, per=per, growth=growth)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-10, atol=1e-10)


def test_a_projection_keeps_squared_norms_on_average() -> None:
    optimizer = Apollo([torch.nn.Parameter(torch.ones(1, 1))], rank=1)
    x = torch.randn(300, generator=torch.Generator().manual_seed(0))
    kept = [
        float((optimizer._projection(16, 300, renewals, x) @ x).square().sum() / x.square().sum())
        for renewals in range(200)
    ]
    # Of a chi-squared variable with 16 degrees of freedom: a deviation of √(2 / 16 / 200).
    assert sum(kept) / len(kept) == pytest.approx(1, abs=4 * 0.025)


@pytest.mark.parametrize("shape", [(30, 8), (8, 30)])
def test_the_state_has_the_longer_side_and_the_rank(shape: tuple[int, int]) -> None:
    weight = torch.nn.Parameter(torch.ones(shape))
    optimizer = Apollo([weight], rank=3)
    weight.grad = torch.randn(shape)
    optimizer.step()
    state = optimizer.state[weight]
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape
    assert sorted(state["exp_avg"].shape) == [3, 30]
    assert state["norm"].ndim == 0


def test_a_zero_gradient_does_not_stop_what_follows() -> None:
    # As the first gradient of LoRA's A is, since B is zero.
    weight = torch.nn.Parameter(torch.zeros(6, 4))
    optimizer = Apollo([weight], 1.0, rank=2)
    for gradient in (torch.zeros(6, 4), torch.ones(6, 4)):
        weight.grad = gradient
        optimizer.step()
    assert weight.detach().abs().min() > 0.1


def test_growth_is_limited() -> None:
    weight = torch.nn.Parameter(torch.zeros(6, 4))
    optimizer = Apollo([weight], 1.0, rank=2)
    norms = []
    for sign in (1, -1, -1):  # the mean of the first two is small, that of all three is not
        weight.grad = sign * torch.ones(6, 4)
        optimizer.step()
        norms.append(float(optimizer.state[weight]["norm"]))
    assert norms[1] < norms[0] / 4
    assert norms[2] == pytest.approx(1.01 * norms[1], rel=1e-4)


@pytest.mark.parametrize("per", ["channel", "tensor"])
def test_another_seed_projects_in_another_way(per: str) -> None:
    ends = []
    for seed in (0, 0, 1):
        weight = torch.nn.Parameter(torch.zeros(12, 8))
        optimizer = Apollo([weight], 0.1, rank=2, per=per, seed=seed)
        weight.grad = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        ends.append(weight.detach())
    assert ends[0].equal(ends[1])
    assert not ends[0].equal(ends[2])


@pytest.mark.parametrize("shape", [(5, 9, 4), (5, 4, 9)])
def test_a_stack_is_scaled_matrix_by_matrix(shape: tuple[int, ...]) -> None:
    gradients = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    for per in ("channel", "tensor"):
        stack = torch.nn.Parameter(torch.zeros(shape))
        matrices = [torch.nn.Parameter(torch.zeros(shape[1:])) for _ in range(len(stack))]
        # Its growth is limited as one.
        together = Apollo([stack], 0.1, rank=3, per=per, growth=1e9)
        apart = Apollo(matrices, 0.1, rank=3, per=per, growth=1e9)
        for gradient in gradients:
            stack.grad = gradient.clone()
            for matrix, own in zip(matrices, gradient, strict=True):
                matrix.grad = own.clone()
            together.step()
            apart.step()
        torch.testing.assert_close(stack.detach(), torch.stack(matrices).detach())
