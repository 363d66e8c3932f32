"""Steps in subspaces: their size, what skips them, what a rule is told."""

from functools import partial

import pytest
import torch
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from lit_ft.loss.chunked import ChunkedCrossEntropy
from lit_ft.subspace import SubspaceUpdater, inject
from lit_ft.subspace.projectors import Oja, Online, SubspaceIteration
from lit_ft.subspace.stats import overlap
from lit_ft.tensors.stochastic_rounding import keyed_generator
from tests.support.subspace_run import NEVER, Run, assert_equal, batches
from tests.support.tiny_model import tiny_model

CPU = torch.device("cpu")


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


def test_bfloat16_weights_learn_and_stay_bfloat16():
    run = Run(Oja(every=1), model=tiny_model("llama", tie_word_embeddings=True).bfloat16(), lr=1e-4)
    before = {name: weight.clone() for name, weight in run.weights.items()}
    run.train(batches(2))
    for name, layer in run.steps.layers.items():
        weight = run.weights[f"{name}.weight"]
        assert weight.dtype == torch.bfloat16
        assert (layer.basis.dtype, layer.delta.dtype) == (torch.bfloat16, torch.float32)
        assert not torch.equal(weight, before[f"{name}.weight"])


def test_a_bfloat16_basis_goes_where_a_float32_one_goes():
    runs = [Run(Oja(every=1), model=tiny_model("llama"), lr=0.0) for _ in range(2)]
    narrow, wide = (list(run.steps.layers.values()) for run in runs)
    for layer in narrow:
        layer.basis.data = layer.basis.data.bfloat16()
        layer.basis.grad_dtype = torch.float32
    for run in runs:
        run.train(batches(20))
    for ours, theirs in zip(narrow, wide, strict=True):
        assert ours.basis.dtype is torch.bfloat16
        assert overlap(ours.wide_basis, theirs.basis) > 0.99
        gram = ours.wide_basis @ ours.wide_basis.T
        torch.testing.assert_close(gram, torch.eye(len(gram)), rtol=0, atol=0.02)


def test_a_move_is_rounded_to_a_bfloat16_basis_without_a_bias():
    layer = inject(tiny_model("llama").bfloat16(), rank=4)["lm_head"]
    moved = layer.wide_basis + 1e-3 * torch.randn(layer.basis.shape)
    rounded = [layer.as_basis(moved, generator=keyed_generator(CPU, n)) for n in range(400)]
    assert {one.dtype for one in rounded} == {torch.bfloat16}
    error = torch.stack(rounded).float().mean(0) - moved
    nearest = moved.bfloat16().float() - moved
    assert error.square().mean().sqrt() < 0.2 * nearest.square().mean().sqrt()


def test_the_sketches_of_a_bfloat16_basis_add_up_in_float32():
    run = Run(Oja(every=1), model=tiny_model("llama").bfloat16())
    layer = run.steps.layers["lm_head"]
    ids, _ = batches(1)[0]
    run.model(ids).logits.float().logsumexp(-1).sum().backward()
    once = layer.basis.grad.clone()
    for _ in range(2):
        run.model(ids).logits.float().logsumexp(-1).sum().backward()
    total = layer.basis.grad
    torch.testing.assert_close(total, 3 * once, rtol=1e-6, atol=0)
    assert not torch.equal(total, total.bfloat16().float())


def test_steps_without_a_loss_leave_the_bases_their_start(caplog):
    data = batches(5)
    straight, late = Run(NEVER), Run(NEVER)
    for _ in range(3):
        late.optimizer.step()
    for run in (straight, late):
        run.train(data)
    for name, layer in straight.steps.layers.items():
        assert torch.equal(layer.basis, late.steps.layers[name].basis)
    assert "did not come through" not in caplog.text  # no layer is to blame


def test_a_layer_that_early_steps_do_not_reach_has_its_rounds_later():
    """As an expert that no token was sent to."""
    torch.manual_seed(0)
    both = torch.nn.ModuleDict({"always": torch.nn.Linear(8, 8), "later": torch.nn.Linear(8, 8)})
    layers = inject(both, rank=2)
    steps = SubspaceUpdater(layers, NEVER)
    optimizer = AdamW([p for p in both.parameters() if p.requires_grad])
    steps.attach(optimizer)
    start = layers["later"].basis.detach().clone()
    for step in range(8):
        x = torch.randn(5, 8)
        out = both["always"](x) + (both["later"](x) if step >= 4 else 0)
        out.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(layers["later"].basis, start) == (step < 4)


def test_unfreezing_the_model_changes_no_rule():
    data = batches(4)
    straight, unfrozen = Run(Oja(every=1)).train(data), Run(Oja(every=1))
    unfrozen.model.requires_grad_(True)  # as BackboneFinetuning and `unfreeze` do
    unfrozen.train(data)
    for name, weight in unfrozen.weights.items():
        torch.testing.assert_close(weight, straight.weights[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("schedule", "peak"),
    [
        (partial(OneCycleLR, max_lr=0.1, total_steps=8), 0.1),  # starts from a 25th of it
        (partial(CyclicLR, base_lr=0.0, max_lr=0.1, step_size_up=4), None),  # of which it is silent
    ],
)
def test_a_rule_is_told_a_share_of_the_highest_rate(monkeypatch, schedule, peak):
    told = []

    def move(self, basis, basis_input, *, decay, **_):
        told.append(decay)
        return basis

    run = Run(NEVER, optimizer=partial(SGD, momentum=0.9))
    monkeypatch.setattr(SubspaceIteration, "move", move)
    rates, seen = schedule(run.optimizer), []
    for batch in batches(3):  # the rounds of the start
        seen += [run.optimizer.param_groups[0]["lr"]] * len(run.steps.layers)
        run.train([batch])
        rates.step()
    assert told == [rate / peak if peak else float(rate > 0) for rate in seen]


def test_what_a_rule_remembers_follows_its_basis():
    """A checkpoint is loaded before Lightning moves the module, here to another precision."""
    data = batches(7)
    first = Run(Online(), model=tiny_model("llama").eval()).train(data[:5])  # past the start
    second = Run(Online(), model=tiny_model("llama").eval())
    second.model.load_state_dict(first.model.state_dict())
    second.steps.load_state_dict(first.steps.state_dict())
    assert all(first.steps.state_dict()["memory"].values())
    second.model.double()
    second.train(data[5:])
    memory = second.steps.state_dict()["memory"]
    assert all(state["exp_avg"].dtype is torch.float64 for state in memory.values())


def test_a_model_made_narrower_takes_its_small_tensors_along():
    model = tiny_model("llama").double().eval()
    layers = inject(model, rank=4)
    model.float()
    assert {layer.basis.dtype for layer in layers.values()} == {torch.float32}
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad])
    SubspaceUpdater(layers, SubspaceIteration(every=1)).attach(optimizer)
    model(batches(1)[0][0]).logits.sum().backward()
    optimizer.step()
    model.bfloat16()
    kept = {(x.basis.dtype, x.delta.dtype, x.energy.dtype) for x in layers.values()}
    assert kept == {(torch.bfloat16, torch.float32, torch.float32)}


def test_deltas_that_another_training_has_released_have_memory_again():
    model = tiny_model("llama")
    layers = inject(model, rank=4)
    for layer in layers.values():
        layer.release_delta()
    before = layers["lm_head"].weight.clone()
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad])
    SubspaceUpdater(layers, NEVER).attach(optimizer)
    model(batches(1)[0][0]).logits.sum().backward()
    optimizer.step()  # as in a loop of one's own, which calls nothing else
    assert not torch.equal(layers["lm_head"].weight, before)


def test_a_second_optimizer_is_not_followed_beside_the_first():
    run = Run(NEVER)
    with pytest.raises(ValueError, match=r"call stop\(\)"):
        run.steps.attach(run.optimizer)
    run.steps.stop()
    run.handle.remove()
    run.steps.attach(run.optimizer)
