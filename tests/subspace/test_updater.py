"""The laws of training in subspaces (design notes of lit_ft.subspace), each on real steps."""

import copy
import io

import bitsandbytes as bnb
import pytest
import torch
from galore_torch import GaLoreAdamW
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import AdamW

from lit_ft.loss.chunked import ChunkedCrossEntropy
from lit_ft.optim import RowwiseAdamW8bit
from lit_ft.subspace import basis_tracker as bases
from lit_ft.subspace.moments import change_of_basis, rotated
from lit_ft.subspace.projectors import SVD, Oja
from tests.support.allocations import NewTensors
from tests.support.subspace_run import NEVER, PROJECTORS, Run, assert_equal, batches
from tests.support.tiny_model import tiny_model


@pytest.mark.parametrize("side", ["right", "left"])
def test_full_rank_with_the_identity_as_basis_is_plain_adamw(side, monkeypatch):
    """Law 1."""
    monkeypatch.setattr(bases, "_START_ROUNDS", 0)
    linear = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()
    plain = copy.deepcopy(linear)
    options = {"lr": 1e-2, "weight_decay": 0.1}
    run = Run(NEVER, rank=6, model=linear, side=side, **options)
    for layer in run.steps.layers.values():
        layer.basis.data.copy_(torch.eye(6))
    optimizer = AdamW(plain.parameters(), **options)
    for seed in range(10):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed)).double()
        for model, stepped in ((linear, run.optimizer), (plain, optimizer)):
            model(x).square().sum().backward()
            stepped.step()
            stepped.zero_grad()
    others = dict(plain.named_parameters())
    for name, weight in run.weights.items():
        torch.testing.assert_close(weight, others[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tied", [True, False])
def test_a_first_step_has_adamws_size_but_in_rows_of_tokens(tied):
    model = tiny_model("llama", tie_word_embeddings=tied).double().eval()
    run = Run(NEVER, model=model, lr=1e-3, weight_decay=0.0)
    before = {name: weight.clone() for name, weight in run.weights.items()}
    run.train(batches(1))
    for name, layer in run.steps.layers.items():
        moved = run.weights[f"{name}.weight"] - before[f"{name}.weight"]
        share = layer.rank / layer.weight.shape[1]  # of the coordinates, each of which moved by lr
        of_tokens = "embed" in name or "head" in name
        used = moved[moved.any(1)]  # an embedding moves the rows of tokens that it saw
        assert len(used) > 0 if of_tokens else len(used) == len(moved)
        expected = 1e-3 * (share**0.5 if of_tokens else 1.0)
        assert used.square().mean().sqrt() == pytest.approx(expected, rel=0.01), name


def svd_with_fixed_signs(monkeypatch):
    """Singular vectors have arbitrary signs, and galore-torch computes them in float32."""
    svd = torch.linalg.svd

    def fixed(matrix, full_matrices):
        left, values, right = svd(matrix.float(), full_matrices=full_matrices)
        largest = right.gather(1, right.abs().argmax(1, keepdim=True))
        return left * largest.sign().T, values, right * largest.sign()

    monkeypatch.setattr(torch.linalg, "svd", fixed)


@pytest.mark.parametrize("gap", [1000, 4])
def test_svd_without_rotation_is_galore_torch(gap, monkeypatch):
    """Law 2: over two refreshes, in float64, two micro-batches against one batch."""
    svd_with_fixed_signs(monkeypatch)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 9)).double()
    # galore-torch puts eps inside the bias correction, torch outside: with eps -> 0 they agree.
    run = Run(
        SVD(every=gap),
        model=copy.deepcopy(plain),
        scale=0.25,
        lr=1e-2,
        eps=1e-30,
        weight_decay=0,
    )
    galore = {"rank": 4, "update_proj_gap": gap, "scale": 0.25, "proj_type": "right"}
    matrices = [p for p in plain.parameters() if p.ndim == 2]
    vectors = [p for p in plain.parameters() if p.ndim < 2]
    reference = GaLoreAdamW(
        [{"params": vectors}, {"params": matrices, **galore}],
        lr=1e-2,
        eps=1e-30,
        no_deprecation_warning=True,
    )
    for seed in range(10):
        x = torch.randn(6, 12, generator=torch.Generator().manual_seed(seed)).double()
        plain(x).square().sum().backward()
        reference.step()
        reference.zero_grad()
        for rows in x.split(3):
            run.model(rows).square().sum().backward()
        run.steps.before_step(run.optimizer)
        run.optimizer.step()
        run.optimizer.zero_grad()
    others = dict(plain.named_parameters())
    for name, weight in run.weights.items():
        torch.testing.assert_close(weight, others[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("projector", PROJECTORS)
def test_micro_batches_equal_one_batch(projector, side):
    """Law 3, in one process: over several moves of the basis."""
    data = batches(8)
    options = {"side": side, "eps": 1e-30}
    whole = Run(PROJECTORS[projector], **options).train(data)
    cut = Run(PROJECTORS[projector], **options).train(data, micro_batches=3)
    assert_equal(whole, cut, rtol=1e-6, atol=1e-7)
    moved = Run(NEVER, **options).train(data)
    assert any(
        not torch.allclose(la.basis, moved.steps.layers[n].basis)
        for n, la in whole.steps.layers.items()
    )


@pytest.mark.parametrize("optimizer", [AdamW, bnb.optim.AdamW8bit, RowwiseAdamW8bit])
@pytest.mark.parametrize("projector", PROJECTORS)
def test_resume_equals_never_having_stopped(projector, optimizer):
    """Law 4: bit for bit, through weights_only, over a move of the basis."""
    data = batches(7)
    model = tiny_model("llama", tie_word_embeddings=True).eval()  # bitsandbytes: float32
    options = {"optimizer": optimizer, "rank": 32, "stagger": True}
    straight = Run(PROJECTORS[projector], model=copy.deepcopy(model), **options).train(data)
    first = Run(PROJECTORS[projector], model=copy.deepcopy(model), **options).train(data[:4])
    file = io.BytesIO()
    torch.save(
        {
            "model": first.model.state_dict(),
            "optimizer": first.optimizer.state_dict(),
            "steps": first.steps.state_dict(),
        },
        file,
    )
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = Run(PROJECTORS[projector], model=copy.deepcopy(model), **options)
    resumed.model.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    resumed.steps.load_state_dict(saved["steps"])
    resumed.train(data[4:])
    assert_equal(resumed, straight)


@settings(deadline=None, max_examples=20)
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


@pytest.mark.parametrize(
    ("eight_bit", "wide", "names"),
    [
        (bnb.optim.AdamW8bit, bnb.optim.AdamW, ("state1", "state2")),
        (RowwiseAdamW8bit, AdamW, ("exp_avg", "exp_avg_sq")),
    ],
)
def test_eight_bit_moments_turn_as_their_values_do(eight_bit, wide, names):
    from lit_ft.subspace.moments import _read, rotate_moments

    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(512, 64))
    states = []
    for kind in (eight_bit, wide):
        optimizer = kind([weight], lr=1e-3)
        for seed in range(3):
            weight.grad = torch.randn(512, 64, generator=torch.Generator().manual_seed(seed))
            optimizer.step()
        states.append(optimizer.state[weight])
        rotation = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(9)))
        assert rotate_moments(states[-1], optimizer.param_groups[0], rotation.Q)
    for name in names:
        quantised, exact = _read(states[0], name), states[1][name]
        assert states[0][name].dtype == torch.uint8
        cosine = torch.cosine_similarity(quantised.flatten(), exact.flatten(), dim=0)
        assert cosine > 0.99


def test_a_skipped_step_leaves_no_trace():
    """As a GradScaler does after an overflow: no step, zero_grad, the next batch."""
    data = batches(4)
    straight, skipping = Run(Oja(every=1)).train(data), Run(Oja(every=1))
    skipping.train(data[:3])
    ids, labels = batches(1, seed=5)[0]
    ChunkedCrossEntropy()(skipping.model, {"input_ids": ids}, labels).backward()
    skipping.optimizer.zero_grad()
    skipping.steps.begin_accumulation()
    skipping.train(data[3:])
    assert_equal(skipping, straight)


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("projector", [Oja(every=1), NEVER])
def test_no_tensor_of_a_gradients_size_is_allocated(projector, watched):
    """Law 7: embedding and head included, on steps that track, that are logged, and others."""
    shapes = {(300, 64), (64, 300), (128, 64), (64, 128), (64, 64), (32, 64), (64, 32)}
    run = Run(projector, rank=4, model=tiny_model("llama", tie_word_embeddings=True))
    data = batches(4, rows=3)
    run.train(data[:2])
    run.steps.stats.await_snapshot(2 if watched else None)
    with NewTensors(shapes, known=run.model.parameters()) as new:
        run.train(data[2:])
        seen = run.steps.stats.snapshot(None)
    assert not new.found
    assert bool(seen.energies) == watched


def test_bfloat16_weights_learn_and_stay_bfloat16():
    run = Run(Oja(every=1), model=tiny_model("llama", tie_word_embeddings=True).bfloat16(), lr=1e-4)
    before = {name: weight.clone() for name, weight in run.weights.items()}
    run.train(batches(2))
    for name, layer in run.steps.layers.items():
        weight = run.weights[f"{name}.weight"]
        assert weight.dtype == torch.bfloat16
        assert layer.basis.dtype == layer.delta.dtype == torch.float32
        assert not torch.equal(weight, before[f"{name}.weight"])
