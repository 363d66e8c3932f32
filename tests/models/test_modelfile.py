"""The Modelfile of an exported model: where Ollama stops, and what its comments tell."""

from __future__ import annotations

import json

from lit_ft.models.export.modelfile import write_modelfile
from tests.support.ollama import read_modelfile


def test_ollama_stops_at_the_control_tokens_of_generate(tokenizer, tmp_path):
    """Not at an ordinary token's text, which may stand inside an answer."""
    tokenizer.save_pretrained(tmp_path)
    ids = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "e", "<|im_end|>"])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [*ids, 10**6]}))
    assert write_modelfile(tmp_path) == []
    modelfile = read_modelfile((tmp_path / "Modelfile").read_text(encoding="utf-8"))
    assert modelfile.stops == ["<|im_end|>", "<|endoftext|>"]


def test_an_answer_ends_without_a_generation_config_too(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "Modelfile").write_text("FROM elsewhere")
    write_modelfile(tmp_path)
    modelfile = read_modelfile((tmp_path / "Modelfile").read_text(encoding="utf-8"))
    assert modelfile.model == "." and modelfile.stops == ["<|im_end|>"]


def test_what_differs_is_told_and_stands_in_the_file(tokenizer, tmp_path):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('none') }}{% endif %}"
        "{{ m.role + m.content + '<|im_end|>' }}{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path)
    (note,) = write_modelfile(tmp_path)
    assert "takes no system message" in note
    assert f"# {note}\n" in (tmp_path / "Modelfile").read_text(encoding="utf-8")


def test_the_command_that_imports_it_names_the_run(tokenizer, tmp_path):
    folder = tmp_path / "my run (2)" / "export"
    tokenizer.save_pretrained(folder)
    (folder.parent / "summary.json").touch()
    write_modelfile(folder)
    assert (folder / "Modelfile").read_text().splitlines()[0].endswith(": ollama create my-run-2")
