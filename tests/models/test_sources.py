"""Where a model comes from."""

import shutil
import traceback

import pytest
import torch
from transformers import AutoConfig, GenerationConfig

from lit_ft.models import FromConfig, Packaged, Pretrained
from tests.support.checkpoints import Poison


def test_the_dtype_of_the_source_wins_over_the_trainers(folder):
    assert Pretrained(str(folder)).load_model(torch.bfloat16).dtype == torch.bfloat16
    source = Pretrained(str(folder), dtype="float32")
    assert source.load_model(torch.bfloat16).dtype == torch.float32


@pytest.mark.parametrize(
    ("source", "named"),
    [
        (Pretrained("./nowhere"), "./nowhere"),
        (Pretrained("no/such/folder"), "not a hub id, which has at most one slash"),
        (Pretrained(".", gguf_file="no.gguf"), "no.gguf"),
        (Pretrained(".", dtype="int3"), "int3"),
        (Packaged("no_such_package", "x.gguf", "pip install it", "X"), "pip install it"),
        (FromConfig("no_such_architecture"), "no_such_architecture"),
        (FromConfig("llama", {"hidden_sise": 8}), "Did you mean hidden_size"),
        (FromConfig("llama", {"hidden_size": "8"}), "'hidden_size' expected int"),
        (FromConfig("llama", {"hidden_size": 8, "num_attention_heads": 3}), "not a multiple"),
        (FromConfig("llama", tokenizer="./nowhere"), "./nowhere"),
    ],
)
def test_what_cannot_be_loaded_is_refused_by_name(source, named):
    with pytest.raises(ValueError, match=named.replace(".", r"\.")):
        source.check()


def test_a_model_that_is_no_causal_one_is_refused_without_its_weights(tmp_path):
    AutoConfig.for_model("t5").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="t5, which is not a causal LM"):
        Pretrained(str(tmp_path)).build_empty()


def test_a_random_model_depends_on_the_seed_alone():
    source = FromConfig(
        "llama",
        {
            "vocab_size": 50,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
    )
    torch.manual_seed(7)
    first = source.load_model(torch.float32).state_dict()
    torch.manual_seed(7)
    second = source.load_model(torch.float32).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", ["pretrained", "from_config"])
def test_an_empty_model_is_the_model_but_for_its_values(kind, folder):
    GenerationConfig(eos_token_id=7).save_pretrained(folder)  # not what config.json says
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    source = Pretrained(str(folder)) if kind == "pretrained" else FromConfig("llama", sizes)
    empty, model = source.build_empty(), source.load_model(torch.float32)
    assert all(weight.is_meta for weight in empty.state_dict().values())
    shapes = [{n: w.shape for n, w in m.state_dict().items()} for m in (empty, model)]
    assert shapes[0] == shapes[1]
    assert empty.all_tied_weights_keys == model.all_tied_weights_keys
    assert empty.generation_config.to_dict() == model.generation_config.to_dict()


def test_weights_that_hold_code_are_refused_without_torchs_advice(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "poisoned")
    for file in copy.glob("*.safetensors*"):
        file.unlink()
    torch.save({"lm_head.weight": Poison(tmp_path / "marker")}, copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match="poisoned: it names getattr, .*safetensors") as refused:
        Pretrained(str(copy)).load_model(torch.float32)
    assert "allowlist" not in "".join(traceback.format_exception(refused.value))
    assert not (tmp_path / "marker").exists()
