"""Small rows as batches, and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from lit_ft.datamodule import InstructionDataModule


def write(path: Path, count: int, *, name: str = "q", length: int = 3) -> str:
    """Write chats whose answers tell them apart: q0, q1, ... of differing lengths."""
    rows = [{"prompt": "hi" * (i % length), "completion": f"{name}{i};"} for i in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def ready(tokenizer: PreTrainedTokenizerFast, path: str | None, **options: Any) -> Any:
    data = InstructionDataModule(path, tokenizer=tokenizer, **options)
    data.prepare_data()
    data.setup("fit")
    return data


def answers(tokenizer: PreTrainedTokenizerFast, batches: Any) -> list[str]:
    """Decode every answer that a loader's labels hold."""
    found = ""
    for batch in batches:
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            found += tokenizer.decode(ids[labels != -100])
    return found.replace("<|im_end|>", "").split(";")[:-1]


def val_batches(data: Any) -> Any:
    """Return the validation batches of all sources."""
    loaders = data.val_dataloader()
    return chain.from_iterable(loaders) if isinstance(loaders, list) else loaders


def table(value: int) -> Callable[[Path], Any]:
    from datasets import Dataset

    return lambda scratch: Dataset.from_dict({"value": [value] * 1000})


def value(dataset: Any) -> int:
    (only,) = set(dataset["value"][:])
    return int(only)
