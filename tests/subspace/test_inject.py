"""Which layers go into subspaces, which are refused, and what their models still save."""

import types

import pytest
import torch
from torch import nn

from lit_ft.subspace import inject
from lit_ft.subspace.layers.head import SubspaceHead
from tests.support.tiny_model import tiny_model


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": -3}, "rank=-3"),
        ({"rank": 1.5}, "rank=1.5"),
        ({"side": "Right"}, "side=Right: give right, left or std"),
        ({"targets": "nonsense"}, "nonsense"),
        ({"targets": ["qq_proj"]}, r"There are q_proj \(2\), embed_tokens, k_proj \(2\)"),
        ({"targets": ["attention", "*"]}, "The target '[*]' is not a regular expression"),
        ({"targets": ["head"]}, "embed_tokens shares its weight with lm_head"),
    ],
)
def test_bad_arguments_are_named_and_leave_the_model_alone(change, named):
    model = tiny_model("llama", tie_word_embeddings=True)
    with pytest.raises(ValueError, match=named.replace(".", r"\.")):
        inject(model, **{"rank": 4, **change})
    assert all(p.requires_grad for p in model.parameters())
    assert not any("Subspace" in type(m).__name__ for m in model.modules())


def test_frozen_and_adapted_models_are_refused():
    from peft import LoraConfig, get_peft_model

    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj is frozen"):
        inject(model, rank=4)
    adapted = get_peft_model(tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="without the adapter"):
        inject(adapted, rank=4)


def test_a_model_whose_weights_are_yet_to_be_loaded_is_refused():
    with torch.device("meta"):
        model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"embed_tokens has no values yet .* load it first"):
        inject(model, rank=4)


def test_a_rank_above_a_layers_smaller_side_is_capped_and_said(caplog):
    caplog.set_level("INFO")
    layers = inject(tiny_model("llama"), rank=48)
    assert layers["model.layers.0.self_attn.k_proj"].rank == 32
    assert layers["model.layers.0.mlp.up_proj"].rank == 48
    assert "model.layers.0.self_attn.k_proj: rank 48 is capped at 32" in caplog.text


class Around(nn.Module):
    """A foreign module that has its transformer under a name of its own."""

    def __init__(self, kind="llama"):
        super().__init__()
        self.llm = tiny_model(kind, tie_word_embeddings=False)
        self.own = nn.Linear(8, 8)


def test_a_transformer_anywhere_in_a_module_is_known_for_what_it_is(tmp_path):
    from safetensors.torch import load_file

    around = Around()
    layers = inject(around, rank=4)
    head = layers["llm.lm_head"]
    assert isinstance(head, SubspaceHead) and head.rows_are_tokens
    for part in (around.llm, around.llm.model):
        part.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "model.safetensors")
        assert saved and not [name for name in saved if "delta" in name or "basis" in name]


@pytest.mark.parametrize(("target", "name"), [("head", "lm_head"), ("embeddings", "wte")])
def test_its_parts_are_targets_by_their_names(target, name):
    [found] = inject(Around("gpt2"), rank=4, targets=target)
    assert found.endswith(name)


def test_matrices_that_no_target_means_are_named_and_loudly_if_they_are_many(caplog):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(4, 8, 8))
            self.router = nn.Linear(8, 8)

    inject(nn.ModuleDict({"experts": Experts()}), rank=2)
    [told] = caplog.records
    assert told.levelname == "WARNING"
    assert "experts.gate_up_proj (Experts); 78.0 % of the model" in told.message
    with pytest.raises(ValueError, match="'mlp': give all, attention, embeddings, head"):
        inject(nn.ModuleDict({"lone": nn.Linear(8, 8)}), rank=2, targets="mlp")


def test_arguments_have_torchs_names():
    linear, tokens = nn.Linear(8, 8), nn.Embedding(8, 8)
    inject(nn.ModuleList([linear, tokens]), rank=2)
    for value in (torch.arange(3), torch.arange(3)[None]):
        assert torch.equal(linear(input=tokens(input=value)), linear(tokens(value)))


def test_positions_are_not_taken_for_tokens():
    around = Around("gpt2")
    assert not [name for name in inject(around, rank=4) if "wpe" in name]
    assert around.llm.transformer.wpe.weight.requires_grad


def test_std_is_the_shorter_side_of_each_layer():
    from transformers.pytorch_utils import Conv1D

    model = nn.ModuleDict(
        {
            "up": nn.Linear(4, 8),
            "square": nn.Linear(8, 8),
            "down": nn.Linear(8, 4),
            "conv_up": Conv1D(8, 4),
            "conv_down": Conv1D(4, 8),
            "tokens": nn.Embedding(3, 8),
        }
    )
    layers = inject(model, rank=2, side="std")
    assert {name: layer.basis.shape[1] for name, layer in layers.items()} == {
        "up": 4,
        "square": 8,
        "down": 4,
        "conv_up": 4,
        "conv_down": 4,
        "tokens": 8,
    }
    assert layers["square"].side == "right"


def test_a_head_that_comes_before_its_tied_embedding_is_right_sided_too():
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.tokens = nn.Linear(8, 20, bias=False), nn.Embedding(20, 8)
            self.head.weight = self.tokens.weight

    model = Reversed()
    inject(model, rank=2, side="left")
    model.head(model.tokens(torch.arange(5)[None])).sum().backward()
    assert model.head.delta.grad.shape == (20, 2)


def test_no_target_at_all_is_refused():
    with pytest.raises(ValueError, match="targets is empty"):
        inject(tiny_model("llama"), rank=4, targets=[])


def test_a_weight_that_is_computed_from_others_is_left_alone(caplog):
    caplog.set_level("INFO")
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    assert list(inject(model, rank=2)) == ["1"]


def test_a_layer_whose_forward_is_replaced_is_refused():
    model = tiny_model("llama")
    layer = model.model.layers[0].mlp.up_proj
    layer.forward = types.MethodType(nn.Linear.forward, layer)
    with pytest.raises(ValueError, match=r"up_proj has a forward method of its own"):
        inject(model, rank=4)


def test_a_second_derivative_is_refused():
    model = tiny_model("llama").eval()
    inject(model, rank=4)
    ids = torch.arange(3, 9)[None]
    embedded = model.get_input_embeddings()(ids)
    embedded.retain_grad()
    loss = model(inputs_embeds=embedded).logits.square().mean()
    [slope] = torch.autograd.grad(loss, embedded, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.square().sum().backward()
