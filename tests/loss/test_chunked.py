"""The summed loss, chunk by chunk or by the model itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from lit_ft.loss import ChunkedCrossEntropy, ModelLoss, chunked_cross_entropy
from lit_ft.loss.targets import IGNORE_INDEX
from tests.support.allocations import LargestTensor
from tests.support.tiny_model import tiny_model


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**16),
    shape=st.tuples(st.integers(1, 3), st.integers(2, 12)),
    masked=st.floats(0, 1),
    chunk_tokens=st.sampled_from([None, 1, 3, 64]),
)
def test_chunked_equals_whole_cross_entropy_in_value_and_gradients(
    seed, shape, masked, chunk_tokens
):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, 8, generator=generator, requires_grad=True)
    weight = torch.randn(20, 8, generator=generator, requires_grad=True)
    labels = torch.randint(0, 20, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < masked] = IGNORE_INDEX

    chunked = chunked_cross_entropy(hidden, weight, labels, chunk_tokens=chunk_tokens)
    logits = (hidden @ weight.T)[:, :-1].flatten(0, 1)
    whole = cross_entropy(
        logits, labels[:, 1:].flatten(), reduction="sum", ignore_index=IGNORE_INDEX
    )

    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5)
    for ours, reference in zip(
        torch.autograd.grad(chunked, (hidden, weight)),
        torch.autograd.grad(whole, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


def test_no_target_gives_zero_and_a_zero_gradient_to_every_parameter():
    for loss in (ChunkedCrossEntropy(), ModelLoss()):
        model = tiny_model("llama")
        ids = torch.arange(8)[None] + 5
        value = loss(model, {"input_ids": ids}, torch.full_like(ids, IGNORE_INDEX))
        value.backward()
        assert value.item() == 0
        assert all(p.grad is not None and p.grad.abs().max() == 0 for p in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_chunked_equals_the_models_own_loss(tied):
    model = tiny_model("llama", tie_word_embeddings=tied)
    ids = torch.randint(3, 300, (2, 16))
    labels = ids.clone()
    labels[:, :5] = IGNORE_INDEX
    chunked = ChunkedCrossEntropy()(model, {"input_ids": ids}, labels)
    own = ModelLoss()(model, {"input_ids": ids}, labels)
    torch.testing.assert_close(chunked, own, rtol=1e-5, atol=1e-5)


def test_vocabulary_sized_logits_are_never_allocated():
    hidden = torch.randn(4, 65, 8, requires_grad=True)
    weight = torch.randn(1000, 8, requires_grad=True)
    labels = torch.randint(0, 1000, (4, 65))
    with LargestTensor() as largest:
        chunked_cross_entropy(hidden, weight, labels, chunk_tokens=16).backward()
    assert largest.numel < 256 * 1000 / 4


@pytest.mark.parametrize(
    ("model_type", "config", "agrees"),
    [
        ("llama", {}, True),
        ("llama", {"tie_word_embeddings": True}, True),
        ("gpt2", {}, True),
        ("qwen3", {"head_dim": 16}, True),
        ("gemma2", {"head_dim": 16}, False),  # caps its logits
        ("granite", {"logits_scaling": 8.0}, False),
        ("cohere", {}, False),  # logit_scale
        ("mixtral", {}, True),
        ("mixtral", {"output_router_logits": True}, False),  # adds a loss
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_transform_logits_or_add_losses_are_detected(model_type, config, agrees, dtype):
    model = tiny_model(model_type, **config).to(dtype)
    ids = torch.randint(3, 300, (1, 32))
    assert ChunkedCrossEntropy().is_exact_for(model, ids) is agrees
    assert model.training
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_an_adapter_on_the_head_takes_the_models_own_loss():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model("llama"), config)
    assert not ChunkedCrossEntropy().is_exact_for(model, torch.randint(3, 300, (1, 32)))


@pytest.mark.parametrize("tokens", [3, 513])
def test_a_validation_loss_in_bfloat16_is_not_rounded(tokens):
    hidden, weight = torch.randn(1, tokens, 64).bfloat16(), torch.randn(999, 64).bfloat16() / 16
    labels = torch.randint(999, (1, tokens))
    logits = torch.nn.functional.linear(hidden, weight)[0, :-1].double()
    expected = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum")
    with torch.no_grad():
        loss = chunked_cross_entropy(hidden, weight, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("repeatable", [False, True])
def test_a_sum_beyond_float16_is_finite_and_so_are_its_gradients(repeatable):
    hidden = torch.randn(8, 1025, 16, requires_grad=True)
    weight = (20 * torch.randn(32, 16)).requires_grad_()
    labels = torch.randint(32, (8, 1025))
    logits = (hidden[:, :-1] @ weight.T).reshape(-1, 32)
    whole = torch.nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="sum")
    assert whole > torch.finfo(torch.float16).max
    with torch.autocast("cpu", torch.float16):
        loss = chunked_cross_entropy(hidden, weight, labels, repeatable=repeatable)
    torch.testing.assert_close(loss, whole, rtol=1e-3, atol=0)
    for ours, exact in zip(
        torch.autograd.grad(loss / 1024, [hidden, weight]),
        torch.autograd.grad(whole / 1024, [hidden, weight]),
        strict=True,
    ):
        assert (ours - exact).norm() < 1e-2 * exact.norm()


@pytest.mark.parametrize("loss", [ChunkedCrossEntropy(), ModelLoss()])
def test_packed_examples_have_the_loss_that_they_have_alone(loss):
    """In training mode: with a cache, transformers would not look for the borders."""
    model = tiny_model("llama").train()
    first, second = torch.randint(3, 300, (1, 9)), torch.randint(3, 300, (1, 6))
    alone = loss(model, {"input_ids": first}, first) + loss(model, {"input_ids": second}, second)
    labels = torch.cat([first, second], 1)
    labels[0, 9] = IGNORE_INDEX
    positions = torch.cat([torch.arange(9), torch.arange(6)])[None]
    inputs = {"input_ids": torch.cat([first, second], 1), "position_ids": positions}
    torch.testing.assert_close(loss(model, inputs, labels), alone, rtol=1e-5, atol=1e-4)
