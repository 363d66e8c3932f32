"""A tokenizer that is loaded without its model's imports is the one that transformers loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lit_ft.models.tokenizer import load_tokenizer
from tests.support.tiny_model import tiny_model


@pytest.fixture
def folder(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("change", [{}, {"tokenizer_class": "LlamaTokenizer"}, None])
def test_it_is_the_tokenizer_that_transformers_loads(folder: Path, change: dict | None) -> None:
    file = folder / "tokenizer_config.json"
    if change is None:
        file.unlink()
    else:
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    ours, theirs = load_tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)
    assert type(ours) is type(theirs)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.chat_template == theirs.chat_template
    assert ours.init_kwargs.keys() == theirs.init_kwargs.keys()


def test_it_imports_no_code_of_models(folder: Path) -> None:
    code = (
        "import sys\nfrom lit_ft.models.tokenizer import load_tokenizer\n"
        f"load_tokenizer({str(folder)!r})\n"
        "print([n for n in ('transformers.core_model_loading', 'torchao') if n in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
