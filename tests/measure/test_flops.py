"""The analytic count against torch's own counter on real forward and backward passes."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lit_ft.measure.flops import peak_flops, training_flops
from lit_ft.subspace import inject

BATCH, LENGTH, LAYERS, HIDDEN, VOCAB = 2, 12, 3, 16, 40
TOKENS = BATCH * LENGTH
LINEAR_OPS = (torch.ops.aten.mm, torch.ops.aten.addmm)


def llama(**changes) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
        **changes,
    )
    return LlamaForCausalLM(config)


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=4, attn_implementation="eager"
    )
    return GPT2LMHeadModel(config)


def lora(*targets: str) -> nn.Module:
    return get_peft_model(llama(), LoraConfig(r=4, target_modules=list(targets)))


def frozen_embedding() -> nn.Module:
    model = llama()
    model.get_input_embeddings().requires_grad_(False)
    return model


def last_layer_alone() -> nn.Module:
    model = llama().requires_grad_(False)
    model.model.layers[-1].requires_grad_(True)
    return model


def in_subspaces(model: nn.Module, **options) -> nn.Module:
    inject(model, rank=4, **options)
    return model


def measured(model: nn.Module) -> dict:
    with FlopCounterMode(display=False) as counter:
        tokens = torch.randint(0, VOCAB, (BATCH, LENGTH))
        model(input_ids=tokens, use_cache=False).logits.sum().backward()
    return counter.get_flop_counts()["Global"]


MODELS = {
    "full": llama,
    "tied": lambda: llama(tie_word_embeddings=True),
    "frozen_embedding": frozen_embedding,
    "last_layer_alone": last_layer_alone,
    "lora_everywhere": lambda: lora(
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    ),
    "lora_q_v": lambda: lora("q_proj", "v_proj"),
    "lora_mlp": lambda: lora("gate_proj", "up_proj"),
    "lora_o": lambda: lora("o_proj"),
    "gpt2": gpt2,
    "subspaces": lambda: in_subspaces(llama(), targets=["attention", "mlp", "head"]),
    "subspaces_left": lambda: in_subspaces(llama(), targets=["mlp"], side="left"),
    "subspaces_gpt2": lambda: in_subspaces(gpt2(), targets=["attention", "mlp"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_linear_part_equals_torchs_counter(name):
    model = MODELS[name]()
    linear = sum(measured(model).get(op, 0) for op in LINEAR_OPS)
    assert training_flops(model).of(num_tokens=TOKENS, sum_squared_lengths=0) == linear


@pytest.mark.parametrize("build", [llama, last_layer_alone, gpt2])
def test_attention_is_the_causal_half_of_torchs_count(build):
    model = build()
    full = measured(model)[torch.ops.aten.bmm]
    ours = training_flops(model).of(num_tokens=0, sum_squared_lengths=BATCH * LENGTH**2)
    assert 2 * ours == full


def test_the_head_counts_on_targets_only_if_asked():
    flops = training_flops(llama())
    head = 3 * 2 * VOCAB * HIDDEN
    everywhere = flops.of(num_tokens=TOKENS, sum_squared_lengths=0)
    on_targets = flops.of(num_tokens=TOKENS, sum_squared_lengths=0, num_targets=5)
    assert everywhere - on_targets == (TOKENS - 5) * head


def test_packed_weights_count_by_their_true_shape():
    bnb = pytest.importorskip("bitsandbytes")
    packed = nn.Sequential(bnb.nn.Linear4bit(64, 128, bias=False)).requires_grad_(False).to("cpu")
    assert training_flops(packed).per_token == 2 * 64 * 128


def test_activation_checkpointing_is_not_useful_work():
    model = llama()
    before = training_flops(model)
    model.activation_checkpointing_enable()
    assert training_flops(model) == before


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2e12),  # Lightning: 82.6
        ("NVIDIA GeForce RTX 4090", torch.float16, 165.2e12),
        ("NVIDIA H200", torch.bfloat16, 989.4e12),  # Lightning: none
        ("NVIDIA L40S", torch.bfloat16, 362e12),  # Lightning: the L4's
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("NVIDIA A100-SXM4-80GB", torch.float64, 9.7e12),  # from Lightning
        ("NVIDIA GeForce RTX 3070", torch.bfloat16, 20.3e12),  # from Lightning
        ("Tesla V100-SXM2-32GB", torch.float16, 125e12),
        ("Tesla V100-SXM2-32GB", torch.bfloat16, None),  # it has none
        ("Unheard-of 9000", torch.bfloat16, None),
    ],
)
def test_the_peak_is_the_dense_one_where_the_card_is_known(name, dtype, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    assert peak_flops(torch.device("cuda"), dtype) == peak


def test_the_cpu_has_no_known_peak():
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None
