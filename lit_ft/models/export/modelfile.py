"""Write the Modelfile with which Ollama imports an exported model and chats as it was trained."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from lit_ft.data.go_template import GoTemplate, go_template
from lit_ft.data.turns import ChatTemplate, end_tokens
from lit_ft.models.base import name_of_folder
from lit_ft.storage.atomic import write_text


def write_modelfile(folder: str | Path, *, name: str | None = None) -> list[str]:
    """Write `Modelfile` into the folder of an exported model.

    It holds the chat template in Ollama's language, the default system message if there is one,
    and the markers at which an answer ends.

    Args:
        folder: The folder of a model with its tokenizer, from which nothing but the tokenizer and
            `generation_config.json` is read.
        name: The name under which Ollama shall import the model; None takes that of the folder or
            of the run that has exported to it. Characters that Ollama does not take become `-`.

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
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", name or name_of_folder(folder)).strip("-.") or "NAME"
    write_text(folder / "Modelfile", modelfile(go, _stops(template, folder), name=name))
    return go.notes


def modelfile(template: GoTemplate, stops: Sequence[str], *, name: str = "NAME") -> str:
    """Return the text of a Modelfile.

    Args:
        template: The chat template in Ollama's language.
        stops: The texts at which an answer ends.
        name: The name under which Ollama shall import the model.
    """
    lines = [f"# To import this model, in this folder: ollama create {name}"]
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
