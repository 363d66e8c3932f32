"""The chat templates of well-known models, as the package `trl` ships them, and chats for them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

_trl = find_spec("trl")
assert _trl is not None and _trl.origin is not None, "pip install -e '.[dev]'"
TEMPLATES = sorted((Path(_trl.origin).parent / "chat_templates").glob("*.jinja"))
NAMES = [path.stem for path in TEMPLATES]


def read(name: str) -> str:
    return TEMPLATES[NAMES.index(name)].read_text(encoding="utf-8")


def talk(turns: int, *, system: bool, reasoning: bool = False) -> list[dict[str, Any]]:
    chat: list[dict[str, Any]] = [{"role": "system", "content": "SYSTEM"}] if system else []
    for i in range(turns):
        chat.append({"role": "user", "content": f"QUESTION{i}"})
        chat.append({"role": "assistant", "content": f"ANSWER{i}"})
        if reasoning:
            chat[-1]["reasoning_content"] = f"THOUGHT{i}"
    return chat
