"""Write the model card of an exported model: its README.md, as the Hugging Face Hub shows it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from lit_ft.models.base import Base, name_of_folder, place_of_folder
from lit_ft.storage.atomic import write_text
from lit_ft.storage.own_card import CARD, is_own_card, signed
from lit_ft.terminal.console import printable

_TEMPLATE = Path(__file__).with_name("card.md.jinja")

_TRANSFORMERS = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model_id = {model}  # this folder, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained(model_id)
model = AutoModelForCausalLM.from_pretrained(model_id, dtype="auto")
"""
_PEFT = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base_id = {base}
adapter_id = {model}  # this folder, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained({tokenizer})
base = AutoModelForCausalLM.from_pretrained(base_id, dtype="auto")
model = PeftModel.from_pretrained(base, adapter_id{options})
"""
_CHAT = """
chat = [{"role": "user", "content": "Hello!"}]
inputs = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)"""
_TEXT = """
inputs = tokenizer("Hello", return_tensors="pt")"""
_GENERATE = """
output = model.generate(**inputs, max_new_tokens=128)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""


@dataclass(frozen=True)
class Training:
    """What a card says of the training.

    Args:
        datasets: The names of the datasets on the Hub that were trained on.
        tags: The tags that say how it was trained, such as "galore".
        tables: Facts, keyed by the title of their table and then by what they are about.
        command: The command; empty if it is not known.
    """

    datasets: Sequence[str] = ()
    tags: Sequence[str] = ()
    tables: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    command: str = ""


@dataclass(frozen=True)
class Card:
    """What the card of an exported model says.

    Args:
        name: The name of the model.
        base: The model that was trained.
        model_id: What `from_pretrained` takes to load the exported model.
        adapter: The kind of the adapter, such as "lora", if the folder holds an adapter alone; None
            for a whole model.
        chats: Whether the tokenizer has a chat template.
        own_tokenizer: Whether the folder holds a tokenizer.
        subfolder: The folder of the model in what `model_id` names; None if it has none of its own.
        training: What it says of the training.
    """

    name: str
    base: Base
    model_id: str
    adapter: str | None = None
    chats: bool = False
    own_tokenizer: bool = True
    subfolder: str | None = None
    training: Training = field(default_factory=Training)

    @property
    def metadata(self) -> ModelCardData:
        """The front matter, which the Hub and llama.cpp's converter read."""
        tags = {"lit_ft", *self.training.tags} | ({"conversational"} if self.chats else set())
        if self.adapter is not None:
            tags |= {self.adapter, "transformers"}  # peft's own cards have both
            tags |= {f"base_model:adapter:{self.base.hub_id}"} if self.base.hub_id else set()
        return ModelCardData(
            base_model=self.base.hub_id,
            datasets=list(self.training.datasets) or None,
            library_name="transformers" if self.adapter is None else "peft",
            license=self.base.license,
            model_name=self.name,
            pipeline_tag="text-generation",
            tags=sorted(tags),
        )

    @property
    def tables(self) -> dict[str, Mapping[str, str]]:
        """The facts, keyed by the title of their table and then by what they are about."""
        hub_id = self.base.hub_id
        base = {
            "name": self.base.name,
            "on the Hub": f"[{hub_id}](https://huggingface.co/{hub_id})" if hub_id else "",
            "license": self.base.license or "",
        }
        known = {what: fact for what, fact in base.items() if fact}
        return {"Base model": known, **self.training.tables}

    @property
    def code(self) -> str:
        """Python code that loads the model and lets it answer; empty for an adapter to nothing."""
        if self.adapter is None:
            load = _TRANSFORMERS.format(model=json.dumps(self.model_id))
        elif self.base.place is None:
            return ""
        else:
            load = _PEFT.format(
                base=json.dumps(self.base.place),
                model=json.dumps(self.model_id),
                tokenizer="adapter_id" if self.own_tokenizer else "base_id",
                options=""
                if self.subfolder is None
                else f", subfolder={json.dumps(self.subfolder)}",
            )
        return f"{load}{_CHAT if self.chats else _TEXT}{_GENERATE}"

    @property
    def summary(self) -> str:
        """A sentence that says what the model is."""
        base = _cell(self.base.name)
        if self.adapter is not None:
            return f"An adapter ({self.adapter}) for {base}, trained with lit_ft."
        return f"A language model, trained with lit_ft. It started from {base}."


def write_cards(
    folder: Path,
    base: Base,
    adapter: Any,
    *,
    name: str | None = None,
    repository: str | None = None,
    training: Training | None = None,
) -> list[Path]:
    """Write the card of an exported model, and that of its adapter if it is there by itself.

    A card that lit_ft has not written, or that was edited since, stays as it is.

    Args:
        folder: The folder of the model or of an adapter alone.
        base: The model that was trained.
        adapter: The `peft.PeftConfig` of the adapter; None without one.
        name: The name of the model; None takes that of the folder or of the run that it is of.
        repository: The name on the Hub ("user/name") to which the folder is uploaded, if it is.
        training: What the cards say of the training; None says nothing.

    Returns:
        The cards that were written.
    """
    whole = (folder / "config.json").is_file()
    kinds: dict[Path, str | None] = {folder: None} if whole else {}
    if adapter is not None:
        kind = str(getattr(adapter.peft_type, "value", adapter.peft_type)).lower()
        kinds[folder / "adapter" if whole else folder] = kind
    chats = (folder / "chat_template.jinja").is_file()  # as transformers 5 writes it
    written = []
    for place, adapter_kind in kinds.items():
        card = Card(
            name or name_of_folder(folder),
            base,
            repository or place_of_folder(place),
            adapter=adapter_kind,
            chats=chats,
            own_tokenizer=(place / "tokenizer_config.json").is_file(),
            subfolder=place.name if repository and place != folder else None,
            training=training or Training(),
        )
        if _write(place, card):
            written.append(place / CARD)
    return written


def _write(folder: Path, card: Card) -> bool:
    path = folder / CARD
    if path.exists() and not is_own_card(path):
        return False
    text = ModelCard.from_template(
        card.metadata,
        template_path=str(_TEMPLATE),
        name=_cell(card.name),
        summary=card.summary,
        code=card.code,
        tables={
            title: {_cell(what): _cell(fact) for what, fact in rows.items()}
            for title, rows in card.tables.items()
        },
        command=printable(card.training.command),
    ).content.rstrip("\n")
    text += "\n"
    write_text(path, signed(text))
    return True


def _cell(text: str) -> str:
    """Return a text as a cell of a table, in which it can neither end the cell nor the line."""
    return printable(" ".join(text.split())).replace("|", "\\|").replace("<", "&lt;")
