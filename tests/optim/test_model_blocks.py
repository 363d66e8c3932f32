"""Which blocks a model has, and which parameters are in each."""

from __future__ import annotations

import pytest
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from lit_ft.compat.refusal import Refusal
from lit_ft.optim.model_blocks import model_blocks, repeated_blocks
from tests.support.tiny_model import tiny_model, two_towers


def names(model: nn.Module, *always: str) -> tuple[dict[str, list[str]], list[str]]:
    """The names of the parameters of each block, and of those that are always trained."""
    of = {p: name for name, p in model.named_parameters()}
    found = model_blocks(model, always)
    return {n: [of[p] for p in held] for n, held in found.blocks.items()}, [
        of[p] for p in found.always
    ]


def all_in_one_place(model: nn.Module, *always: str) -> None:
    blocks, others = names(model, *always)
    listed = [name for held in blocks.values() for name in held] + others
    assert sorted(listed) == sorted(n for n, p in model.named_parameters() if p.requires_grad)


def test_embeddings_layers_and_head_are_blocks_and_the_last_norm_is_with_the_head():
    model = tiny_model("llama", tie_word_embeddings=False)
    blocks, always = names(model)
    assert list(blocks) == ["embeddings", "model.layers.0", "model.layers.1", "head"]
    assert blocks["embeddings"] == ["model.embed_tokens.weight"]
    assert blocks["head"] == ["model.norm.weight", "lm_head.weight"]
    assert all(name.startswith("model.layers.1.") for name in blocks["model.layers.1"])
    assert always == []
    all_in_one_place(model)


@pytest.mark.parametrize(
    ("kind", "embeddings"),
    [
        ("llama", ["model.embed_tokens.weight", "model.norm.weight"]),
        (
            "gpt2",
            ["transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight"]
            + ["transformer.ln_f.bias"],
        ),
        ("gemma3_text", ["model.embed_tokens.weight", "model.norm.weight"]),
        ("mixtral", ["model.embed_tokens.weight", "model.norm.weight"]),
    ],
)
def test_a_tied_head_is_in_the_embeddings_block(kind, embeddings):
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4} if kind == "gpt2" else {}
    model = tiny_model(kind, tie_word_embeddings=True, **sizes)
    blocks, _ = names(model)
    assert list(blocks)[0] == "embeddings"
    assert blocks["embeddings"] == embeddings
    assert len(blocks) == 3
    all_in_one_place(model)


def test_what_is_always_trained_is_in_no_block():
    model = tiny_model("llama", tie_word_embeddings=False)
    blocks, always = names(model, "embeddings", "head")
    assert list(blocks) == ["model.layers.0", "model.layers.1"]
    assert always == ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    blocks, always = names(model, "norm")
    assert blocks["head"] == ["lm_head.weight"]
    assert len(always) == 5
    all_in_one_place(model, "norm", "head")
    tied = tiny_model("llama", tie_word_embeddings=True)
    assert names(tied, "head")[1] == ["model.embed_tokens.weight", "model.norm.weight"]
    with pytest.raises(Refusal, match="always='adapter' fits no trainable parameter"):
        model_blocks(model, ["adapter"])
    with pytest.raises(Refusal, match="always covers every parameter of Llama") as said:
        model_blocks(model, ["."])
    assert "Correct callbacks.blocks.always" in said.value.on_command_line
    assert "update=" not in said.value.on_command_line


def test_frozen_parameters_are_in_no_block():
    model = tiny_model("llama", tie_word_embeddings=False)
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    blocks, _ = names(model)
    assert list(blocks) == ["model.layers.1", "head"]


class Tower(nn.Module):
    """Somebody's network, with a small list inside each member of a large one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.stages = nn.ModuleList(
            nn.ModuleDict({"inner": nn.ModuleList(nn.Linear(8, 8) for _ in range(2))})
            for _ in range(3)
        )
        self.out = nn.Linear(8, 2)


def test_any_list_of_modules_of_one_class_is_one_of_blocks():
    blocks, _ = names(Tower())
    assert list(blocks) == ["stages.0", "stages.1", "stages.2", "head"]
    assert blocks["head"] == ["stem.0.weight", "stem.0.bias", "out.weight", "out.bias"]
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert list(repeated_blocks(plain)) == ["0", "1"]


def test_a_transformer_inside_another_module_is_found():
    outer = nn.ModuleDict({"net": tiny_model("llama"), "probe": nn.Linear(2, 2)})
    assert list(repeated_blocks(outer)) == ["net.model.layers.0", "net.model.layers.1"]


@pytest.mark.parametrize("model", [nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU())])
def test_a_model_without_blocks_is_refused_by_what_it_lacks(model):
    with pytest.raises(
        ValueError, match=r"no repeated blocks: neither `_no_split_modules`.*one cl"
    ):
        model_blocks(model)


def test_only_the_tower_of_the_input_embeddings_has_blocks():
    model = two_towers()
    blocks, _ = names(model)
    layers = [f"model.language_model.layers.{i}" for i in range(2)]
    assert list(blocks) == ["embeddings", *layers]
    listed = [name for held in blocks.values() for name in held]
    others = [n for n, _ in model.named_parameters() if "vision_tower" in n]
    assert sorted(listed + others) == sorted(n for n, _ in model.named_parameters())
    assert [n for n in blocks["embeddings"] if "projector" in n]  # it is in no tower
    outer = nn.ModuleDict({"net": model, "probe": nn.Linear(2, 2)})
    assert list(names(outer)[0]) == ["embeddings", *(f"net.{name}" for name in layers)]


def test_two_models_side_by_side_both_have_blocks():
    both = nn.ModuleList([tiny_model("llama"), tiny_model("llama")])
    assert len(repeated_blocks(both)) == len(names(both)[0]) - 2 == 4


def test_an_encoder_and_a_decoder_that_share_embeddings_both_have_blocks():
    config = T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2, vocab_size=40)
    blocks, _ = names(T5ForConditionalGeneration(config))
    assert [n for n in blocks if n.startswith("encoder.")]
    assert [n for n in blocks if n.startswith("decoder.")]
