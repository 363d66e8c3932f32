"""Export what a model needs to chat, besides its weights: the tokenizer and the end tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write a tokenizer that transformers 4 and 5 both read.

    transformers 5 writes the name of a class, and a list, that 4 does not know. Both read what 4
    wrote.

    Args:
        tokenizer: The tokenizer, with the chat template that it was trained with.
        folder: The existing folder to write to.
    """
    tokenizer.save_pretrained(folder)
    path = Path(folder) / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def stop_at(folder: str | Path, end_tokens: Sequence[int]) -> None:
    """Let an exported model stop at further tokens, besides those at which it stops already.

    Args:
        folder: The folder of the exported model.
        end_tokens: The ids of tokens that end an answer; none changes nothing.
    """
    path, model = Path(folder) / "generation_config.json", Path(folder) / "config.json"
    if not end_tokens or not model.is_file():
        return
    # As JSON: the class refuses to write what some models come with, and it knows no other file.
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    own = config.get("eos_token_id")
    if own is None:
        own = json.loads(model.read_text(encoding="utf-8")).get("eos_token_id")
    own = [] if own is None else own if isinstance(own, list) else [own]
    ends = list(dict.fromkeys([*own, *end_tokens]))
    config["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
