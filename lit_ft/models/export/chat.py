"""Export the tokenizer and the end tokens, which a model needs to chat."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write a tokenizer that transformers 4 and 5 both read.

    transformers 5 writes the name of a class and a list that transformers 4 does not know. This
    function writes both in the form of transformers 4, which transformers 5 also reads.

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
    """Make `generate` stop at additional tokens with an exported model.

    Args:
        folder: The folder of the exported model. A folder that holds only an adapter stays as it
            is.
        end_tokens: The ids of the additional tokens, which end an answer. If there are none, the
            folder stays as it is.
    """
    path, model = Path(folder) / "generation_config.json", Path(folder) / "config.json"
    if not end_tokens or not model.is_file():
        return
    # Edited as JSON, because GenerationConfig refuses to write what some models come with.
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    own = config.get("eos_token_id")
    if own is None:
        own = json.loads(model.read_text(encoding="utf-8")).get("eos_token_id")
    own = [] if own is None else own if isinstance(own, list) else [own]
    ends = list(dict.fromkeys([*own, *end_tokens]))
    config["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
