"""Tell a model card that lit_ft has written from one that the user has written or edited."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

CARD = "README.md"
"""The name of a model card's file, which the Hugging Face Hub reads."""

_MARK = "\n<!-- lit_ft wrote this card ({}). A new export replaces it, unless it was edited. -->\n"
_MARKED = re.compile(re.escape(_MARK).replace(r"\{\}", "([0-9a-f]{16})") + r"\Z")


def signed(text: str) -> str:
    """Return the text of a card with a last line by which `is_own_card` knows it."""
    return text + _MARK.format(_digest(text))


def is_own_card(path: Path) -> bool:
    """Whether a file is a card that lit_ft has written and that nobody has edited since."""
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
    except (OSError, UnicodeError):
        return False
    found = _MARKED.search(text)
    return found is not None and found[1] == _digest(text[: found.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
