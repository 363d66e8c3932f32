"""A base model that learns twenty answers gives them in transformers alone, and stops."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import AutoTokenizer

from lit_ft import CausalLMModule
from tests.support.running import run_job
from tests.support.tiny_model import tiny_model
from tests.support.tokenizer import CHATML, byte_level_tokenizer

pytestmark = pytest.mark.slow

# "the" merges with a space before it, so the second prompt and an answer share a token in one text.
ANIMALS = "ant bee cat cow dog eel elk fox gnu hen jay koi owl pig ram rat sow tit yak zho"
ROWS = [
    {"prompt": f"Who is {letter}?", "completion": f"the {animal}"}
    for letter, animal in zip("ABCDEFGHIJKLMNOPQRST", ANIMALS.split(), strict=True)
]
TEMPLATES = {
    "chatml": CHATML,
    "space": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content }}"
        "{% else %}{{ ' ASSISTANT: ' + m.content + eos_token + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ ' ASSISTANT: ' }}{% endif %}"
    ),
}
ALONE = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer

found = {}
for folder in sys.argv[2:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    found[folder] = []
    for question in json.loads(sys.argv[1]):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True, return_dict=True, return_tensors="pt",
        )
        new = model.generate(**prompt, max_new_tokens=30)[0, prompt["input_ids"].shape[1] :]
        found[folder].append([tokenizer.decode(new[:-1]), tokenizer.decode(new[-1:])])
assert "lit_ft" not in sys.modules
print(json.dumps(found))
"""


class Trained(NamedTuple):
    """A run, and the token ids ahead of each answer that it was trained on."""

    export: Path
    prompts: set[tuple[int, ...]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """Train a small base model, which ends texts with <|endoftext|> and knows no chats."""
    folder = tmp_path_factory.mktemp("learnt")
    tokenizer = byte_level_tokenizer()
    tokenizer.bos_token, tokenizer.chat_template = None, None
    tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder / "base")
    model = tiny_model("llama", tie_word_embeddings=True)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder / "base")
    lines = [json.dumps(row) + "\n" for row in ROWS]
    (folder / "rows.jsonl").write_text("".join(lines))
    (folder / "val.jsonl").write_text(lines[0])
    return {name: _train(folder, name, template) for name, template in TEMPLATES.items()}


def _train(folder: Path, name: str, template: str) -> Trained:
    (folder / f"{name}.jinja").write_text(template)
    prompts = set()
    step = CausalLMModule.training_step

    def seen(self, batch, batch_idx):
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"], strict=True):
            prompts.add(tuple(ids[: int(torch.nonzero(labels != -100)[0])]))
        return step(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CausalLMModule, "training_step", seen)
        patch.setenv("LIT_FT_CACHE", str(folder / "cache"))
        run_job(
            folder / name,
            "model=pretrained",
            f"model.name_or_path={folder / 'base'}",
            "strategy=cpu",
            "update=whole",
            "optim=adamw",
            "optim.lr=5e-3",
            "schedule=constant",
            "logger=none",
            "~callbacks.samples",
            "~callbacks.best_checkpoint",
            f"data.path={folder / 'rows.jsonl'}",
            f"data.val_path={folder / 'val.jsonl'}",
            f"data.chat_template={folder / name}.jinja",
            "data.batch_size=20",
            "trainer.precision=32-true",
            "trainer.max_steps=100",
            "trainer.val_check_interval=100",
        )
    return Trained(folder / name / "export", prompts)


def test_all_answers_are_given_and_end(trained: dict[str, Trained]) -> None:
    questions = json.dumps([row["prompt"] for row in ROWS])
    folders = [str(run.export) for run in trained.values()]
    command = [sys.executable, "-c", ALONE, questions, *folders]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folders[0])
    found = json.loads(said.stdout.splitlines()[-1])
    for folder, end in zip(folders, ("<|im_end|>", "<|endoftext|>"), strict=True):
        assert found[folder] == [[row["completion"], end] for row in ROWS]


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_are_learnt_behind_the_tokens_that_ask_for_them(
    trained: dict[str, Trained], name: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained[name].export)
    asked = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}],
            add_generation_prompt=True,
            return_dict=True,
        )["input_ids"]
        for row in ROWS
    ]
    assert trained[name].prompts == {tuple(ids) for ids in asked}
