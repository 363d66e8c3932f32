"""When bases move, and what is seen of it: laws, on real layers and real steps."""

import copy
import io
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lit_ft.losses import ChunkedCrossEntropy
from lit_ft.subspace import Refresh, inject, layer_group
from lit_ft.subspace import energy as energy_module
from lit_ft.subspace.energy import captured_and_total_energy
from lit_ft.subspace.observation import overlap, squared_update
from lit_ft.subspace.projectors import SVD, Oja, Online, Random, SubspaceIteration
from lit_ft.subspace.schedule import Turns
from tests.test_subspace_step import Run, assert_equal, batches, tiny_model

# Turns


@given(
    every=st.integers(1, 12),
    count=st.integers(1, 9),
    stagger=st.booleans(),
    at_once=st.booleans(),
    start=st.integers(0, 30),
)
def test_turns_come_every_so_many_steps_each_layer_at_its_offset(
    every, count, stagger, at_once, start
):
    names = [str(index) for index in range(count)]
    turns = Turns(names, Refresh(stagger=stagger), every=every, at_once=at_once, step=start)
    for step in range(start, start + 40):
        for index, name in enumerate(names):
            offset = index * every // count if stagger else 0
            if at_once:
                due = step == 0 or (step > offset and (step - offset) % every == 0)
            else:
                due = (step + 1 - offset) % every == 0
            assert turns.is_due(name, step) == due
        turns.pass_on(step, dict.fromkeys(names, 1.0))


def turns_taken(turns, overlaps, steps):
    """The steps at which the one layer moves; `overlaps` are those of its moves, in turn."""
    taken, overlaps = [], iter(overlaps)
    for step in range(steps):
        seen = {}
        if turns.is_due("layer", step):
            taken.append(step)
            seen = {"layer": next(overlaps)}
        turns.pass_on(step, seen)
    return taken


def test_a_layer_that_rests_waits_twice_as_long_up_to_the_longest_and_moves_on_at_once():
    refresh = Refresh(every=10, adaptive=True, threshold=0.5, longest=4)
    rests, moves = 0.5, 0.49
    taken = turns_taken(
        Turns(["layer"], refresh, every=1),
        [rests] * 4 + [moves, rests, math.nan, rests, rests],
        230,
    )
    assert [b - a for a, b in zip(taken, taken[1:], strict=False)] == [
        *(20, 40, 40, 40),  # it rests
        *(10, 20, 10, 20),  # it moves, rests, lost its rank, rests
    ]
    still = Turns(["layer"], Refresh(every=10), every=1)
    assert turns_taken(still, [rests] * 9, 90) == list(range(9, 90, 10))


@given(longest=st.integers(1, 9), every=st.integers(1, 5), rests=st.lists(st.booleans()))
def test_an_interval_lies_between_the_base_and_the_longest(longest, every, rests):
    turns = Turns(["layer"], Refresh(adaptive=True, longest=longest), every=every)
    for rest in rests:
        before = turns.interval["layer"]
        turns.pass_on(turns.next["layer"], {"layer": float(rest)})
        assert turns.interval["layer"] == (min(2 * before, longest * every) if rest else every)


def test_another_schedules_turns_are_not_continued():
    ours, theirs = (
        Turns(["a", "b"], Refresh(adaptive=adaptive), every=4) for adaptive in (True, False)
    )
    for turns in (ours, theirs):
        for step in range(9):
            turns.pass_on(step, {"a": 1.0, "b": 1.0})
    fresh = Turns(["a", "b"], Refresh(), every=4)
    fresh.load_state_dict(ours.state_dict(), step=9)
    assert (fresh.next, fresh.interval) == (theirs.next, theirs.interval)
    again = Turns(["a", "b"], Refresh(adaptive=True), every=4)
    again.load_state_dict(ours.state_dict(), step=9)
    assert (again.next, again.interval) == (ours.next, ours.interval)
    assert again.interval != fresh.interval


@pytest.mark.parametrize(
    "wrong", [{"every": 0}, {"threshold": 0.0}, {"threshold": 1.5}, {"longest": 0}]
)
def test_a_refresh_out_of_its_range_is_refused_by_name(wrong):
    [(name, value)] = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        Refresh(**wrong)


# Steps


def moves_of(projector, refresh, steps):
    """At which steps which layers' bases move."""
    run = Run(projector, refresh=refresh)
    moved = []
    for data in batches(steps):
        before = {n: la.basis.detach().clone() for n, la in run.steps.layers.items()}
        run.step(*data)
        moved.append(
            {n for n, la in run.steps.layers.items() if not torch.equal(before[n], la.basis)}
        )
    return moved, list(run.steps.layers)


@pytest.mark.parametrize("projector", [SVD(every=4), SubspaceIteration(every=4), Random(every=4)])
def test_bases_move_when_it_is_their_turn_and_at_no_other_step(projector):
    moved, names = moves_of(projector, Refresh(), 12)
    for step, found in enumerate(moved):
        expected = set()
        for index, name in enumerate(names):
            offset = index * 4 // len(names)
            if isinstance(projector, SVD):
                due = step == 0 or (step > offset and (step - offset) % 4 == 0)
            else:
                due = (step + 1 - offset) % 4 == 0
            if due or (step < 3 and isinstance(projector, SubspaceIteration)):
                expected.add(name)
        assert found == expected, step


def test_the_interval_of_the_refresh_stands_above_the_projectors():
    moved, _ = moves_of(SubspaceIteration(every=1), Refresh(every=5, stagger=False), 11)
    assert [step for step, names in enumerate(moved) if names] == [0, 1, 2, 4, 9]


@pytest.mark.parametrize(
    ("threshold", "expected"), [(0.01, [5, 11, 23, 35]), (1.0, list(range(5, 36, 3)))]
)
def test_an_adaptive_run_moves_less_often_where_bases_rest(threshold, expected):
    refresh = Refresh(every=3, stagger=False, adaptive=True, threshold=threshold, longest=4)
    moved, _ = moves_of(SubspaceIteration(), refresh, 36)
    # Rounds 0 to 2 take the random start to the data: they do not count as turns.
    assert [step for step, names in enumerate(moved) if names] == [0, 1, 2, *expected]


@pytest.mark.parametrize(
    ("projector", "threshold"),
    [(SubspaceIteration(every=2), 0.35), (SVD(every=2), 0.15), (Oja(every=1), 0.99)],
)
def test_an_adaptive_run_resumes_bit_for_bit(projector, threshold):
    data = batches(14)
    model = tiny_model("llama", tie_word_embeddings=True).double().eval()
    refresh = Refresh(adaptive=True, threshold=threshold, longest=4)

    def run_of():
        return Run(projector, model=copy.deepcopy(model), refresh=refresh)

    straight, first, resumed = run_of().train(data), run_of().train(data[:7]), run_of()
    file = io.BytesIO()
    torch.save([p.state_dict() for p in (first.model, first.optimizer, first.steps)], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for part, state in zip((resumed.model, resumed.optimizer, resumed.steps), saved, strict=True):
        part.load_state_dict(state)
    assert len(set(saved[2]["turns"]["interval"].values())) > 1  # some layers rest
    resumed.train(data[7:])
    assert_equal(resumed, straight)
    assert resumed.steps.state_dict()["turns"] == straight.steps.state_dict()["turns"]


# Overlap and step


@settings(deadline=None, max_examples=30)
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
    run.steps.observation.await_reading(1)
    run.train(data[2:])
    moved = torch.cat([(la.weight - before[n]).ravel() for n, la in run.steps.layers.items()])
    reading = run.steps.observation.read(None)
    assert reading.step_rms == pytest.approx(moved.square().mean().sqrt().item() / 1e-3, rel=1e-6)
    assert run.steps.observation.read(None).step_rms is None


def test_the_first_step_of_adamw_in_subspaces_has_adamws_size():
    run = Run(Oja(every=1), lr=1e-3)
    run.steps.observation.await_reading(1)
    run.train(batches(1))
    # AdamW's first step is the gradient's sign; rows of the embedding that no token named rest.
    embedding = run.steps.layers["model.embed_tokens"].weight
    assert run.steps.observation.read(None).step_rms == pytest.approx(1, abs=0.15), embedding.shape


# Energy


def explicit(rows, cols, basis):
    """Per-sample gradients, formed, and what is left of them in the span of the basis."""
    gradients = rows.mT @ cols
    projection = torch.linalg.pinv(basis) @ basis
    return torch.stack([(gradients @ projection).square().sum(), gradients.square().sum()])


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 10**6),
    samples=st.integers(0, 3),
    length=st.integers(1, 6),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)),
    block=st.integers(1, 40),
    one_hot=st.booleans(),
)
def test_energies_equal_those_of_the_gradients_that_are_never_formed(
    seed, samples, length, sizes, block, one_hot
):
    torch.manual_seed(seed)
    m, n, rank = sizes
    cols = torch.randn(samples, length, n).double()
    basis = torch.randn(min(rank, n), n).double()  # not orthonormal: Online's are not
    ids = torch.randint(0, m, (samples, length))
    rows = torch.randn(samples, length, m).double()
    of_ids = nn.functional.one_hot(ids, m).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(energy_module, "_BLOCK_ENTRIES", block)
        found = captured_and_total_energy(ids if one_hot else rows, cols, cols @ basis.T, basis)
    torch.testing.assert_close(
        found, explicit(of_ids if one_hot else rows, cols, basis), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("samples", [(7,), ()])
def test_without_sequences_every_row_is_a_sample(samples):
    torch.manual_seed(0)
    rows, cols = torch.randn(*samples, 4).double(), torch.randn(*samples, 5).double()
    basis = torch.randn(2, 5).double()
    found = captured_and_total_energy(rows, cols, cols @ basis.T, basis)
    expected = explicit(rows.reshape(-1, 1, 4), cols.reshape(-1, 1, 5), basis)
    torch.testing.assert_close(found, expected)


def energies_of(model, layers, ids, labels):
    loss = ChunkedCrossEntropy(chunk_tokens=64)(model, {"input_ids": ids}, labels)
    (loss / 7).backward()  # energies go by the square
    return {name: layer.energy.grad.clone() for name, layer in layers.items()}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "llama tied"])
def test_a_models_energies_are_those_of_its_sequences_however_the_batch_is_cut(name, side):
    options = (
        {} if name != "gpt2" else dict.fromkeys(["attn_pdrop", "embd_pdrop", "resid_pdrop"], 0)
    )
    plain = tiny_model(name.split()[0], tie_word_embeddings=False, **options).double().eval()
    model = copy.deepcopy(plain)
    if name == "llama tied":  # the plain one shows the gradients of the weight's two uses
        model.lm_head.weight = model.model.embed_tokens.weight
        plain.lm_head.weight.data.copy_(plain.model.embed_tokens.weight)
    layers = inject(model, rank=4, side=side)
    for layer in layers.values():
        layer.energy.requires_grad_(True)
    ids, labels = batches(1)[0]
    expected = {key: torch.zeros(2).double() for key in layers}
    for row in range(len(ids)):
        plain.zero_grad()
        one = slice(row, row + 1)
        (ChunkedCrossEntropy()(plain, {"input_ids": ids[one]}, labels[one]) / 7).backward()
        for key, module in plain.named_modules():
            owner = "model.embed_tokens" if key == "lm_head" and name == "llama tied" else key
            if owner in layers:
                layer, gradient = layers[owner], module.weight.grad
                gradient = gradient.T if layer.views_transposed else gradient
                parts = [gradient @ layer.basis.T, gradient]
                expected[owner] += torch.stack([part.square().sum() for part in parts])
    whole = energies_of(model, layers, ids, labels)
    for layer in layers.values():
        layer.forget_evidence()
    energies_of(model, layers, ids[:1], labels[:1])
    cut = energies_of(model, layers, ids[1:], labels[1:])
    for key, layer in layers.items():
        torch.testing.assert_close(whole[key], expected[key], msg=key)
        torch.testing.assert_close(cut[key], whole[key], msg=key)
        assert layer.basis.grad is None  # no sketch was asked for


def test_a_layer_that_is_used_twice_has_the_energies_of_both_uses():
    first = nn.Linear(6, 6, bias=False).double()
    second, shared = copy.deepcopy(first), copy.deepcopy(first)
    [layer] = inject(shared, rank=3).values()
    layer.energy.requires_grad_(True)
    x = torch.randn(2, 4, 6).double()
    shared(shared(x).tanh()).square().sum().backward()
    expected = torch.zeros(2).double()
    for sample in x:
        second(first(sample).tanh()).square().sum().backward()
        for gradient in (first.weight.grad, second.weight.grad):
            expected += torch.stack(
                [(gradient @ layer.basis.T).square().sum(), gradient.square().sum()]
            )
        first.weight.grad = second.weight.grad = None
    torch.testing.assert_close(layer.energy.grad, expected)


def test_the_energies_of_an_orthonormal_basis_are_the_trace_of_the_sketch():
    model = tiny_model("llama", tie_word_embeddings=True).double().eval()
    layers = inject(model, rank=4)
    for layer in layers.values():
        layer.energy.requires_grad_(True)
        layer.basis.requires_grad_(True)
    for name, energy in energies_of(model, layers, *batches(1)[0]).items():
        basis = layers[name].basis
        torch.testing.assert_close((basis.grad * basis).sum(), energy[0], msg=name)


def test_a_basis_of_full_rank_captures_everything():
    model = tiny_model("llama", tie_word_embeddings=True).double().eval()
    layers = inject(model, rank=64)
    for layer in layers.values():
        layer.energy.requires_grad_(True)
    for name, (captured, total) in energies_of(model, layers, *batches(1)[0]).items():
        if layers[name].rank == layers[name].basis.shape[1]:
            torch.testing.assert_close(captured, total, msg=name)
        else:
            assert captured < total


def test_checkpointing_autocast_and_compilation_leave_the_energies_alone():
    model = tiny_model("llama", tie_word_embeddings=True)
    layers = inject(model, rank=4)
    ids, labels = batches(1)[0]

    def energies(model=model, dtype=None):
        for layer in layers.values():
            layer.energy.grad = None
            layer.energy.requires_grad_(True)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            ChunkedCrossEntropy()(model, {"input_ids": ids}, labels).backward()
        return torch.stack([layer.energy.grad for layer in layers.values()])

    reference = energies()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    torch.testing.assert_close(energies(), reference)
    torch.testing.assert_close(energies(dtype=torch.bfloat16), reference, rtol=0.1, atol=0)
    model.gradient_checkpointing_disable()
    model.model.compile(backend="aot_eager")
    torch.testing.assert_close(energies(), reference)


def test_energy_goes_where_the_basis_goes():
    model = tiny_model("llama", tie_word_embeddings=True)
    inject(model, rank=4)
    for moved in (model.bfloat16(), copy.deepcopy(model), model.double()):
        head, embedding = moved.lm_head, moved.model.embed_tokens
        assert head.energy is embedding.energy
        assert (head.energy.dtype, head.energy.device) == (head.basis.dtype, head.basis.device)


def test_energy_is_neither_saved_nor_exported_nor_stepped_nor_broadcast():
    model = tiny_model("llama", tie_word_embeddings=True)
    inject(model, rank=4)
    known = [*model.state_dict(), *dict(model.named_parameters()), *dict(model.named_buffers())]
    assert not [name for name in known if "energy" in name]


def test_watching_changes_nothing_and_costs_only_the_step_that_is_read():
    data = batches(6)
    silent, watched = Run(Oja(every=1)).train(data), Run(Oja(every=1))
    asked = []
    watched.steps.observation.await_reading(4)
    for one in data:
        asked.append(all(la.energy.requires_grad for la in watched.steps.layers.values()))
        watched.step(*one)
    assert asked == [False, False, False, True, False, False]
    assert_equal(watched, silent)
    reading = watched.steps.observation.read(None)
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
                run.steps.observation.await_reading(1)
            run.step(*one)
            yield waits
            waits = 0
            run.steps.observation.read(None)
            assert waits <= 1

    fixed = replace(refresh, adaptive=False)
    never = list(waits_of(Run(Oja(every=1), refresh=fixed), watch=False))
    seen = list(waits_of(Run(Oja(every=1), refresh=refresh), watch=watch))
    assert [b - a for a, b in zip(never, seen, strict=True)] == more


@pytest.mark.parametrize(("every", "steps"), [(1, {3}), (3, {2, 3})])
def test_of_a_layers_moves_before_a_reading_the_last_is_measured(every, steps, monkeypatch):
    import lit_ft.subspace.stepping as stepping

    run = Run(Oja(every=every), refresh=Refresh())
    measured = []

    def recorded(old, new):
        measured.append(run.steps.step)
        return overlap(old, new)

    monkeypatch.setattr(stepping, "overlap", recorded)
    run.steps.observation.await_reading(4)
    run.train(batches(8))
    assert len(measured) == len(run.steps.layers)
    assert set(measured) == steps


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.embed_tokens", "embeddings"),
        ("lm_head", "head"),
        ("model.layers.1.self_attn.o_proj", "attention"),
        ("model.layers.1.mlp.up_proj", "mlp"),
    ],
)
def test_a_layer_is_counted_with_its_part_of_the_model(name, group):
    layers = inject(tiny_model("llama"), rank=4)
    assert layer_group(name, layers[name]) == group
    assert layer_group("net.0", layers["model.layers.0.mlp.up_proj"]) == "other"
