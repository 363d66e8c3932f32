"""A task of lm-eval with letters, and a model that knows all of its answers or none."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from tests.support.letters import Plain
from tests.support.tiny_model import tiny_model

NAME = "successor"
QUESTIONS = """
from datasets import Dataset

LETTERS = "abcdefghijklmnop"


def made(**_):
    rows = []
    for number, (letter, after) in enumerate(zip(LETTERS, LETTERS[1:])):
        choices = [after, "z"] if number % 2 else ["z", after]
        rows.append({"text": letter, "choices": choices, "answer": choices.index(after)})
    return {"test": Dataset.from_list(rows)}


def offline(**_):
    raise ConnectionError("Couldn't reach 'a/b' on the Hub (LocalEntryNotFoundError)")


def broken(**_):
    raise KeyError("text")


def text_of_first(doc):
    assert doc["text"] != "b", "no text for b"
    return doc["text"]
"""
YAML = """
task: {name}
custom_dataset: !function questions.{data}
output_type: multiple_choice
test_split: test
doc_to_text: {text}
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def write_task(
    folder: Path, *, name: str = NAME, data: str = "made", text: str = "text", more: str = ""
) -> Path:
    """Write a task that asks for the letter after a letter, and return its file."""
    (folder / "questions.py").write_text(QUESTIONS)
    file = folder / f"{name}.yaml"
    file.write_text(YAML.format(name=name, data=data, text=text) + more)
    return file


class Knowing(Plain):
    """Reads each letter and expects the next one, or any but that, and learns nothing."""

    def __init__(self, *, is_right: bool = True) -> None:
        super().__init__()
        self.model = knowing_model(is_right=is_right)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def knowing_model(*, is_right: bool = True) -> LlamaForCausalLM:
    sizes = {"vocab_size": 27, "hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 1}
    model = tiny_model("llama", **sizes, bos_token_id=None)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()  # what it expects depends on the last letter alone
        letters = torch.eye(27, 32)
        model.model.embed_tokens.weight.copy_(letters)
        model.lm_head.weight.copy_(letters.roll(1, dims=0) * (1 if is_right else -1))
    return model
