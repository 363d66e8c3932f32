"""Captured energy against that of gradients that are formed."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lit_ft.loss.chunked import ChunkedCrossEntropy
from lit_ft.subspace import inject
from lit_ft.subspace.layers import energy as energy_module
from lit_ft.subspace.layers.energy import captured_and_total_energy
from tests.support.subspace_run import batches
from tests.support.tiny_model import tiny_model


def explicit(rows, cols, basis):
    """Per-sample gradients, formed, and what is left of them in the span of the basis."""
    gradients = rows.mT @ cols
    projection = torch.linalg.pinv(basis) @ basis
    return torch.stack([(gradients @ projection).square().sum(), gradients.square().sum()])


@settings(max_examples=50)
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
        layer.clear_basis_input()
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


@pytest.mark.process  # a C++ compiler runs
def test_checkpointing_autocast_and_compilation_leave_the_energies_alone():
    model = tiny_model("llama", tie_word_embeddings=True, num_hidden_layers=1)  # seconds to compile
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
        assert (head.energy.dtype, head.energy.device) == (head.delta.dtype, head.basis.device)


def test_energy_is_neither_saved_nor_exported_nor_stepped_nor_broadcast():
    model = tiny_model("llama", tie_word_embeddings=True)
    inject(model, rank=4)
    known = [*model.state_dict(), *dict(model.named_parameters()), *dict(model.named_buffers())]
    assert not [name for name in known if "energy" in name]
