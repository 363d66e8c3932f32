"""What is seen of subspaces while they train: laws, on real steps."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_ft.subspace import Refresh
from lit_ft.subspace.projectors import Oja, Online, SubspaceIteration
from lit_ft.subspace.stats import overlap, squared_update
from tests.support.subspace_run import Run, assert_equal, batches


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), rank=st.integers(1, 5), cols=st.integers(5, 9))
def test_overlap_is_of_the_spans_whatever_their_bases(seed, rank, cols):
    torch.manual_seed(seed)
    old, new = torch.randn(2, rank, cols).double()
    projections = [torch.linalg.pinv(basis) @ basis for basis in (old, new)]
    expected = (projections[0] @ projections[1]).trace() / rank
    torch.testing.assert_close(overlap(old, new), expected, rtol=1e-6, atol=1e-8)
    mixed = torch.eye(rank).double() + torch.rand(rank, rank).double().triu()
    torch.testing.assert_close(overlap(old, mixed @ old).item(), 1.0, rtol=1e-6, atol=1e-8)
    orthonormal = [torch.linalg.qr(basis.T).Q.T for basis in (old, new)]
    squares = (orthonormal[0] @ orthonormal[1].T).square().sum() / rank
    torch.testing.assert_close(overlap(*orthonormal), squares)


def test_the_squared_update_is_that_of_the_lifted_step():
    torch.manual_seed(0)
    delta, basis = torch.randn(6, 3).double(), torch.randn(3, 8).double()
    torch.testing.assert_close(squared_update(delta, basis), (delta @ basis).square().sum())


@pytest.mark.parametrize("projector", [Oja(every=1), Online(lr=0.05)])
def test_step_rms_is_what_the_weights_moved_by_over_the_learning_rate(projector):
    run = Run(projector, lr=1e-3, weight_decay=0.0)
    data = batches(3)
    run.train(data[:2])
    before = {n: la.weight.clone() for n, la in run.steps.layers.items()}
    run.steps.stats.await_snapshot(1)
    run.train(data[2:])
    moved = torch.cat([(la.weight - before[n]).ravel() for n, la in run.steps.layers.items()])
    reading = run.steps.stats.snapshot(None)
    assert reading.step_rms == pytest.approx(moved.square().mean().sqrt().item() / 1e-3, rel=1e-6)
    assert run.steps.stats.snapshot(None).step_rms is None


def test_the_first_step_of_adamw_in_subspaces_has_adamws_size():
    run = Run(Oja(every=1), lr=1e-3)
    run.steps.stats.await_snapshot(1)
    run.train(batches(1))
    # AdamW's first step is the gradient's sign; rows of the embedding that no token named rest.
    embedding = run.steps.layers["model.embed_tokens"].weight
    assert run.steps.stats.snapshot(None).step_rms == pytest.approx(1, abs=0.15), embedding.shape


def test_watching_changes_nothing_and_costs_only_the_step_that_is_read():
    data = batches(6)
    silent, watched = Run(Oja(every=1)).train(data), Run(Oja(every=1))
    asked = []
    watched.steps.stats.await_snapshot(4)
    for one in data:
        asked.append(all(la.energy.requires_grad for la in watched.steps.layers.values()))
        watched.step(*one)
    assert asked == [False, False, False, True, False, False]
    assert_equal(watched, silent)
    reading = watched.steps.stats.snapshot(None)
    for seen in (reading.energies, reading.overlaps, reading.seconds):
        assert seen.keys() == watched.steps.layers.keys()
    assert all(0 < captured < total for captured, total in reading.energies.values())
    assert all(0.5 < share < 1 for share in reading.overlaps.values())
    assert all(0 < seconds < 10 for seconds in reading.seconds.values())


@pytest.mark.parametrize(
    ("refresh", "watch", "more"),
    [
        (Refresh(), True, [0] * 9),
        (Refresh(adaptive=True, longest=1), True, [0, 0, 0, *[1] * 6]),
        (
            Refresh(every=4, stagger=False, adaptive=True, longest=1),
            False,
            [0, 0, 0, 1, 0, 0, 0, 1, 0],
        ),
    ],
)
def test_the_host_waits_once_a_reading_and_once_a_step_of_adaptive_moves(
    refresh, watch, more, monkeypatch
):
    waits = 0

    def counted(method):
        def wait(*args):
            nonlocal waits
            waits += 1
            return method(*args)

        return wait

    for name in ("tolist", "item", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name)))

    def waits_of(run, watch):
        nonlocal waits
        for one in batches(9):
            waits = 0
            if watch:
                run.steps.stats.await_snapshot(1)
            run.step(*one)
            yield waits
            waits = 0
            run.steps.stats.snapshot(None)
            assert waits <= 1

    fixed = replace(refresh, adaptive=False)
    never = list(waits_of(Run(SubspaceIteration(every=1), refresh=fixed), watch=False))
    seen = list(waits_of(Run(SubspaceIteration(every=1), refresh=refresh), watch=watch))
    assert [b - a for a, b in zip(never, seen, strict=True)] == more


@pytest.mark.parametrize(("every", "steps"), [(1, {3}), (3, {2, 3})])
def test_of_a_layers_moves_before_a_reading_the_last_is_measured(every, steps, monkeypatch):
    from lit_ft.subspace import basis_tracker as bases

    run = Run(Oja(every=every), refresh=Refresh())
    measured = []

    def recorded(old, new):
        measured.append(run.steps.step)
        return overlap(old, new)

    monkeypatch.setattr(bases, "overlap", recorded)
    run.steps.stats.await_snapshot(4)
    run.train(batches(8))
    assert len(measured) == len(run.steps.layers)
    assert set(measured) == steps
