"""The layers compute what they did, and their small gradients are those of the whole weights."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lit_ft.loss import ChunkedCrossEntropy, ModelLoss
from lit_ft.loss.targets import IGNORE_INDEX
from lit_ft.subspace import inject, layer_group, subspace_layers
from tests.support.allocations import LargestTensor
from tests.support.tiny_model import tiny_model

IDS = torch.randint(3, 300, (3, 12), generator=torch.Generator().manual_seed(0))
LABELS = IDS.masked_fill(torch.arange(12) < torch.tensor([[2], [9], [5]]), IGNORE_INDEX)
MODELS = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "gpt2": {"tie_word_embeddings": False, "attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0},
    "qwen2": {},  # biases
}


def model_and_twin(name, *, blocks=2, **options):
    """A float64 model and the same one with its layers in subspaces."""
    model = tiny_model(name.split()[0], num_hidden_layers=blocks, **MODELS[name])
    plain = model.double().eval()
    twin = copy.deepcopy(plain)
    layers = inject(twin, rank=options.pop("rank", 4), **options)
    return plain, twin, layers


def forget(model, layers):
    model.zero_grad()
    for layer in layers.values():
        layer.clear_basis_input()


def track(layers):
    for layer in layers.values():
        layer.basis.requires_grad_(True)


@pytest.mark.parametrize("loss", [ChunkedCrossEntropy(chunk_tokens=3), ModelLoss()])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_of_delta_is_the_projected_gradient(name, side, loss):
    plain, twin, layers = model_and_twin(name, side=side)
    track(layers)  # sketches must not change it
    values = [loss(model, {"input_ids": IDS}, LABELS) for model in (plain, twin)]
    torch.testing.assert_close(values[0], values[1])
    for value in values:
        value.backward()
    modules = dict(plain.named_modules())
    assert len(layers) >= 5
    for key, layer in layers.items():
        gradient = modules[key].weight.grad
        gradient = gradient.T if layer.views_transposed else gradient
        torch.testing.assert_close(layer.delta.grad, gradient @ layer.basis.T)
    deltas = {id(layer.delta) for layer in layers.values()}
    ours = [p for p in twin.named_parameters() if p[1].requires_grad and id(p[1]) not in deltas]
    others = dict(plain.named_parameters())
    for key, parameter in ours:
        torch.testing.assert_close(parameter.grad, others[key].grad, msg=key)


@pytest.mark.parametrize("loss", [ChunkedCrossEntropy(chunk_tokens=64), ModelLoss()])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_sketch_is_the_sum_over_sequences(name, side, loss):
    _, twin, layers = model_and_twin(name, side=side)
    plain = tiny_model(name, **MODELS[name]).double().eval()
    expected = {}
    for row in range(len(IDS)):
        plain.zero_grad()
        loss(plain, {"input_ids": IDS[row : row + 1]}, LABELS[row : row + 1]).backward()
        modules = dict(plain.named_modules())
        for key, layer in layers.items():
            gradient = modules[key].weight.grad
            gradient = gradient.T if layer.views_transposed else gradient
            expected[key] = expected.get(key, 0) + (gradient @ layer.basis.T).T @ gradient
    track(layers)
    for rows in (IDS, IDS[:1], IDS[1:]):  # whole, and in two micro-batches
        labels = {3: LABELS, 1: LABELS[:1], 2: LABELS[1:]}[len(rows)]
        if len(rows) == 1:
            first = {key: layer.basis.grad.clone() for key, layer in layers.items()}
            forget(twin, layers)
        loss(twin, {"input_ids": rows}, labels).backward()
    for key, layer in layers.items():
        torch.testing.assert_close(first[key], expected[key].detach(), msg=key)
        torch.testing.assert_close(layer.basis.grad, expected[key].detach(), msg=key)


def test_tied_layers_share_one_delta_and_one_basis_wherever_the_model_goes():
    _, twin, layers = model_and_twin("llama tied")
    assert "lm_head" not in layers
    for model in (twin, copy.deepcopy(twin), twin.float(), twin.bfloat16()):
        head, embedding = model.lm_head, model.model.embed_tokens
        assert head.delta is embedding.delta
        assert head.basis is embedding.basis
        assert "basis" in dict(head.named_buffers())
        assert head.delta.dtype in (torch.float32, torch.float64)  # never 16 bits
    assert twin.lm_head.weight.dtype == torch.bfloat16
    assert list(subspace_layers(twin)) == list(layers)


def test_a_layer_that_is_used_twice_sums_both_gradients():
    linear = nn.Linear(6, 6).double()
    twin = copy.deepcopy(linear)
    [layer] = inject(twin, rank=3).values()
    layer.basis.requires_grad_(True)
    x = torch.randn(4, 6, dtype=torch.float64)
    for module in (linear, twin):
        module(module(x).tanh()).square().sum().backward()
    torch.testing.assert_close(layer.delta.grad, linear.weight.grad @ layer.basis.T)
    assert layer.basis.grad is not None


@pytest.mark.parametrize("side", ["right", "left"])
def test_without_sequences_each_row_is_a_sample(side):
    linear = nn.Linear(6, 7).double()
    [layer] = inject(copy.deepcopy(linear), rank=3, side=side).values()
    x = torch.randn(5, 6).double()
    expected = 0
    for row in x:
        linear.zero_grad()
        linear(row).square().sum().backward()
        gradient = linear.weight.grad.T if side == "left" else linear.weight.grad
        expected = expected + (gradient @ layer.basis.T).T @ gradient
    layer.basis.requires_grad_(True)
    for rows in ([x], list(x)):  # [5, 6], and five times [6]
        layer.clear_basis_input()
        for row in rows:
            layer(row).square().sum().backward()
        torch.testing.assert_close(layer.basis.grad, expected)


def test_ids_without_sequences_are_samples_one_by_one():
    embedding = nn.Embedding(9, 6).double()
    [layer] = inject(embedding, rank=3).values()
    layer.basis.requires_grad_(True)
    ids = torch.tensor([3, 1, 3])
    layer(ids).square().sum().backward()
    rows = 2 * layer.weight[ids]
    torch.testing.assert_close(layer.basis.grad, layer.basis.detach() @ rows.T @ rows)


def test_the_heads_sketch_does_not_overflow_in_float16():
    model = tiny_model("llama", tie_word_embeddings=False)
    [head] = inject(model, rank=4, targets="head").values()
    head.basis.requires_grad_(True)
    hidden = 60 * torch.randn(2, 100, 64, generator=torch.Generator().manual_seed(0))
    sketches = []
    for half in (False, True):
        head.clear_basis_input()
        with torch.autocast("cpu", torch.float16, enabled=half):
            labels = torch.arange(200).view(2, 100)
            head.summed_cross_entropy(hidden, labels, chunk_tokens=64).backward()
        sketches.append(head.basis.grad)
    assert sketches[0].abs().max() > 1e5  # float16 ends at 65,504
    assert torch.cosine_similarity(*(sketch.flatten() for sketch in sketches), dim=0) > 0.999


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_fold_moves_the_weight_by_alpha_s_p_and_decays_it(name, side):
    _, twin, layers = model_and_twin(name, side=side)
    for layer in layers.values():
        before = layer.moving_weight.clone()
        step = torch.randn_like(layer.delta)
        layer.delta.data.copy_(step)
        layer.fold(scale=0.5, decay=0.1)
        torch.testing.assert_close(layer.moving_weight, 0.9 * before + 0.5 * step @ layer.basis)
        assert layer.moving_weight.data_ptr() == layer.weight.data_ptr()
        assert not layer.delta.any()


@pytest.mark.process  # a C++ compiler runs
def test_checkpointing_autocast_and_compilation_leave_the_gradients_alone():
    _, twin, layers = model_and_twin("llama tied", blocks=1)  # seconds to compile
    twin.float()
    track(layers)

    def gradients(model=twin, dtype=None):
        forget(twin, layers)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            ChunkedCrossEntropy()(model, {"input_ids": IDS}, LABELS).backward()
        return [t.clone() for la in layers.values() for t in (la.delta.grad, la.basis.grad)]

    reference = gradients()
    twin.activation_checkpointing_enable({"use_reentrant": False})
    twin.train()
    for ours, theirs in zip(gradients(), reference, strict=True):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(gradients(dtype=torch.bfloat16), reference, strict=True):
        cosine = torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0)
        assert cosine > 0.99
    twin.activation_checkpointing_disable()
    twin.model.compile()
    for ours, theirs in zip(gradients(), reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 6), st.integers(0, 2**31))
def test_the_sketch_of_an_embedding_sums_over_the_places_of_an_id(rows, length, ids, seed):
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Embedding(ids, 6, dtype=torch.float64)
    [layer] = inject(layer, rank=min(2, ids), seed=seed).values()
    layer.basis.requires_grad_(True)
    tokens = torch.randint(ids, (rows, length), generator=generator)
    grad = torch.randn(rows, length, 6, generator=generator, dtype=torch.float64)
    layer(tokens).backward(grad)
    one_hot = nn.functional.one_hot(tokens, ids).double()
    whole = one_hot.mT @ grad  # G_s
    sketch = ((whole @ layer.basis.detach().T).mT @ whole).sum(0)
    torch.testing.assert_close(layer.basis.grad, sketch)


def test_long_sequences_and_many_rows_need_no_more_than_thin_tensors():
    length, many, wide = 512, 24, 64
    embedding, linear = nn.Embedding(9, wide), nn.Linear(wide, wide, bias=False)
    layers = inject(nn.ModuleList([embedding, linear]), rank=16)
    track(layers)
    ids = torch.randint(9, (1, length))
    x, slope = torch.randn(many, 5, wide), torch.randn(many, 5, wide)
    largest = LargestTensor()
    with largest:
        embedding(ids).sum().backward()
    assert largest.numel < length * length
    largest = LargestTensor()
    with largest:
        linear(x).backward(slope)
    assert largest.numel <= max(x.numel(), 16 * wide * 2)
    assert linear.basis.grad.any()


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
