"""Exports: merged models, adapters apart, and what a folder never mixes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Params4bit
from hydra.utils import instantiate
from omegaconf import OmegaConf
from peft import LoraConfig, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
)

from lit_ft.data.turns import end_tokens
from lit_ft.models import Pretrained, add_adapter, export_model
from lit_ft.models.export.chat import stop_at
from lit_ft.models.export.whole import merged
from tests.support.running import CONF

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


OTHERS = ["miss", "hira", "shira", "randlora", "oft", "vera"]  # as their files have them


def config_of(kind):
    if kind in ADAPTERS:
        own = ADAPTERS[kind]
        return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **own)
    file = OmegaConf.load(CONF / "adapter" / f"{kind}.yaml")
    small = {"oft_block_size": 4} if kind == "oft" else {"r": 4}
    return instantiate(OmegaConf.merge({"seed": 3}, file, {"adapter": small}).adapter)


def trained_adapter(folder, kind):
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    source = Pretrained(str(folder), quantization_config=quantised if kind[0] == "q" else None)
    config = config_of(kind)
    model = add_adapter(source.load_model(torch.float32), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("kind", [*ADAPTERS, *OTHERS])
def test_merged_export_gives_the_trained_logits_and_leaves_the_model_alone(folder, kind, tmp_path):
    model = trained_adapter(folder, kind)
    with torch.no_grad():
        logits = model(IDS).logits
        export_model(model, None, tmp_path / "out")
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        torch.testing.assert_close(exported(IDS).logits, logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(IDS).logits, logits, rtol=0, atol=0)


def test_an_adapter_is_merged_into_8_bit_weights(folder):
    quantised = BitsAndBytesConfig(load_in_8bit=True)
    model = add_adapter(
        Pretrained(str(folder), quantization_config=quantised).load_model(torch.float32),
        config_of("lora"),
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
        logits = model(IDS).logits
        whole = merged(model).float().eval()
        torch.testing.assert_close(model(IDS).logits, logits, rtol=0, atol=0)
        difference = (whole(IDS).logits - logits).norm() / logits.norm()
    assert difference < 0.1  # 8-bit products round their inputs too


def test_4_bit_weights_are_dequantised_on_the_host(folder, monkeypatch):
    """On a GPU there is seldom room for them: the copy of each goes there through `to("cpu")`."""
    model = trained_adapter(folder, "qlora")
    asked, to = [], Params4bit.to
    monkeypatch.setattr(
        Params4bit, "to", lambda p, *args: (asked.append((p, args)), to(p, *args))[1]
    )
    whole = merged(model)
    own = [p for p in model.parameters() if isinstance(p, Params4bit)]
    assert [args for _, args in asked] == [("cpu",)] * len(own) and own
    # It moves what it is called on, which must not be what is still trained.
    assert not {id(p) for p, _ in asked} & {id(p) for p in own}
    assert not {id(p.quant_state) for p, _ in asked} & {id(p.quant_state) for p in own}
    assert not any(isinstance(p, Params4bit) for p in whole.parameters())


def test_a_merge_copies_no_weight_on_the_device(folder, tmp_path, monkeypatch):
    """On a GPU a second copy of the weights may not fit: all copies go through `to("cpu")`."""
    model = trained_adapter(folder, "lora")
    copied = []
    deepcopy = torch.nn.Parameter.__deepcopy__

    def note(self, memo):
        copied.append(self.shape)
        return deepcopy(self, memo)

    monkeypatch.setattr(torch.nn.Parameter, "__deepcopy__", note)
    export_model(model, None, tmp_path / "out")
    assert copied == []


@pytest.mark.parametrize("kind", [*(k for k in ADAPTERS if k[0] != "q"), *OTHERS])
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


def test_others_may_read_the_weights_as_they_may_any_new_file(folder, tmp_path):
    (tmp_path / "new").touch()
    export_model(trained_adapter(folder, "lora"), None, tmp_path / "out")
    files = [*(tmp_path / "out").rglob("*.safetensors")]
    assert {file.name for file in files} == {"model.safetensors", "adapter_model.safetensors"}
    assert {file.stat().st_mode for file in files} == {(tmp_path / "new").stat().st_mode}


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


@pytest.mark.parametrize("own", [None, 0, [0, 1]])
def test_the_export_stops_where_an_answer_ends(folder, tokenizer, tmp_path, own):
    """A base model stops at the end of a text only, and would run on behind an answer."""
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = Pretrained(str(folder)).load_model(torch.float32)
    model.generation_config.eos_token_id = own
    export_model(model, tokenizer, tmp_path, end_tokens=end_tokens(tokenizer))
    stops = GenerationConfig.from_pretrained(tmp_path).eos_token_id
    assert stops == (end if own is None else [0, end] if own == 0 else [0, 1, end])
    assert model.generation_config.eos_token_id == own


def test_a_text_ends_at_the_end_of_text_token_too(folder, tokenizer, tmp_path):
    """Plain text is learnt with it, and chats whose template writes no end."""
    tokenizer.eos_token = "<|endoftext|>"
    ids = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert end_tokens(tokenizer) == ids
    model = Pretrained(str(folder)).load_model(torch.float32)
    model.generation_config.eos_token_id = 7
    export_model(model, tokenizer, tmp_path, end_tokens=end_tokens(tokenizer))
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [7, *ids]
    assert end_tokens(tokenizer, 7) == end_tokens(tokenizer, [7]) == [7, *ids]
    tokenizer.chat_template = None
    assert end_tokens(tokenizer) == ids[1:]
    assert end_tokens(None) == []


def test_the_exported_tokenizer_is_read_by_transformers_4_too(folder, tokenizer, tmp_path):
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|speaker|>"]})
    export_model(Pretrained(str(folder)).load_model(torch.float32), tokenizer, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    # What transformers 4 does not know: tried with 4.57.6.
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(config.get("extra_special_tokens"), list)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.all_special_tokens == tokenizer.all_special_tokens
    assert again.chat_template == tokenizer.chat_template
    assert again.encode("<|speaker|> the end") == tokenizer.encode("<|speaker|> the end")


def test_an_exported_model_keeps_its_own_ends(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": 2}')
    stop_at(tmp_path, [7])
    config = json.loads((tmp_path / "generation_config.json").read_text())
    assert config["eos_token_id"] == [2, 7]
    # Llama 2 comes with these, which transformers reads and refuses to write.
    config |= {"do_sample": False, "temperature": 0.9}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    stop_at(tmp_path, [7, 8])
    assert json.loads((tmp_path / "generation_config.json").read_text()) == config | {
        "eos_token_id": [2, 7, 8]
    }
