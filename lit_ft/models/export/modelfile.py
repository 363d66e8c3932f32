"""Write the Modelfile with which Ollama imports an exported model and chats as it was trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from lit_ft.data.go_template import GoTemplate, go_template
from lit_ft.data.turns import ChatTemplate, end_tokens
from lit_ft.storage.atomic import write_text


def write_modelfile(folder: str | Path) -> list[str]:
    """Write `Modelfile` into the folder of an exported model.

    It holds the chat template in Ollama's language, the default system message if there is one,
    and the markers at which an answer ends.

    Args:
        folder: The folder of a model with its tokenizer, from which nothing but the tokenizer and
            `generation_config.json` is read.

    Returns:
        Sentences on what Ollama does in another way than the chat template. The file has them as
        comments.

    Raises:
        Refusal: If the tokenizer has no chat template, or one that Ollama's language cannot say.
    """
    folder = Path(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    template = ChatTemplate(tokenizer)
    go = go_template(template)
    write_text(folder / "Modelfile", modelfile(go, _stops(template, folder)))
    return go.notes


def modelfile(template: GoTemplate, stops: Sequence[str]) -> str:
    """Return the text of a Modelfile.

    Args:
        template: The chat template in Ollama's language.
        stops: The texts at which an answer ends.
    """
    lines = ["# To import this model, in this folder: ollama create NAME"]
    lines += [f"# {note}" for note in template.notes]
    lines += ["FROM .", f'TEMPLATE """{template.text}"""']
    if template.system:
        lines.append(f'SYSTEM """{template.system}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join(lines) + "\n"


def _stops(template: ChatTemplate, folder: Path) -> list[str]:
    """Return the markers that end an answer, and the control tokens at which `generate` stops."""
    path = folder / "generation_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    ends = end_tokens(None, config.get("eos_token_id"))
    # Ollama stops wherever it finds these texts, which ordinary tokens may share.
    added = template.tokenizer.added_tokens_decoder
    return list(dict.fromkeys([*template.ends, *(str(added[id]) for id in ends if id in added)]))
