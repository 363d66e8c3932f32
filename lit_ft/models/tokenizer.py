"""Load a tokenizer, without the imports of its model where it is of a general class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

_GENERAL = ("TokenizersBackend", "PreTrainedTokenizerFast")


def load_tokenizer(folder: str, **options: Any) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model.

    Args:
        folder: A local folder, or a name on the Hugging Face hub.
        **options: Options of `AutoTokenizer.from_pretrained`, such as `revision`.
    """
    config = _plain_config(Path(folder))
    if config is not None:
        options = {**options, "config": config}
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **options)
    return tokenizer


def _plain_config(folder: Path) -> PreTrainedConfig | None:
    """Return the model's configuration as an object of no model's class; None if that would matter.

    For a tokenizer of a general class, `AutoTokenizer` needs only values of the configuration. The
    configuration's own class would import what runs the model, which takes a second or two.
    """
    try:
        described = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if described["tokenizer_class"] not in _GENERAL or "auto_map" in {**described, **values}:
            return None
    except (OSError, ValueError, LookupError, TypeError):
        return None  # on the hub, or for transformers to name what is wrong
    return PreTrainedConfig.from_dict({**values, "_name_or_path": str(folder)})
