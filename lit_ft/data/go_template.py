"""Write a chat template as a template of Ollama, whose language is that of Go's text/template."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import date
from typing import NamedTuple

from lit_ft.data.pieces import Pieces, pieces_of
from lit_ft.data.turns import ChatTemplate

# A brace may open an action, three quotes end the text in a Modelfile, and Ollama drops other
# characters that are not printable.
_UNSAFE = re.compile(r'\{+|"{3,}|[^\n\t\x20-\x7e]+')
_MESSAGES = "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"


class GoTemplate(NamedTuple):
    """A chat template in Go's language.

    Args:
        text: The template.
        system: The default system message, which is not in the template; empty if there is none.
        notes: Sentences on what Ollama does in another way than the chat template.
    """

    text: str
    system: str
    notes: list[str]


def go_template(template: ChatTemplate) -> GoTemplate:
    """Return a chat template in Go's language, for chats without tools.

    The text that opens a chat is left out where the tokenizer adds it, since Ollama does that too.

    Raises:
        Refusal: If the words around a message depend on more than its role.
    """
    pieces = pieces_of(template)
    start, system, notes = _without_bos(template, pieces)
    head, default = _head(start, system, pieces.default_system)
    if system is None:
        notes.append("The chat template takes no system message, so Ollama leaves it out.")
    dated = "strftime_now" in str(template.tokenizer.chat_template)
    if dated and str(date.today().year) in start + "".join(system or ()):
        notes.append("The chat template writes the day's date. Here it stays that of this file.")
    if pieces.knows_thoughts and pieces.thinking is None:
        notes.append(
            "Ollama keeps thoughts in answers as they are, which the chat template does not."
        )
    body = _user(pieces) + _answer(pieces)
    return GoTemplate(f"{head}{_MESSAGES}{body}" + "{{ end }}{{ end }}", default, notes)


def _without_bos(
    template: ChatTemplate, pieces: Pieces
) -> tuple[str, tuple[str, str] | None, list[str]]:
    """Return what opens a chat, without the token that the tokenizer adds, and notes."""
    start, system, bos = pieces.start, pieces.system, _added_by(template)
    notes = []
    if not start.startswith(bos):
        notes.append(f"Ollama begins each chat with {bos}, which the chat template does not.")
    if system is not None:
        system = system[0].removeprefix(bos), system[1]
    return start.removeprefix(bos), system, notes


def _added_by(template: ChatTemplate) -> str:
    """Return the token that the tokenizer puts at the beginning of a text, or nothing."""
    tokenizer = template.tokenizer
    bos, ids = tokenizer.bos_token_id, tokenizer("a")["input_ids"]
    return str(tokenizer.bos_token) if bos is not None and ids[:1] == [bos] else ""


def _head(start: str, system: tuple[str, str] | None, default: str) -> tuple[str, str]:
    """Return what opens a chat, and the default system message if it can stand apart."""
    if system is None:
        return _literal(start), ""
    is_plain = '"""' not in default and all(c.isprintable() or c in "\n\t" for c in default)
    default = default if is_plain else ""
    without = "" if default else _otherwise(start)
    before, after = map(_literal, system)
    return _if(".System", f"{before}{_value('.System')}{after}", without), default


def _user(pieces: Pieces) -> str:
    before, after = map(_literal, pieces.user)
    before = _if("gt $i 1", before) if pieces.opens_first else before
    opening, thinking = _literal(pieces.opening), pieces.thinking
    if thinking is not None and thinking.opening_without != pieces.opening:
        off = "and $.IsThinkSet (not $.Think)"
        opening = _if(off, _literal(thinking.opening_without), _otherwise(pieces.opening))
    said = before + _value(".Content") + after + _if("$last", opening)
    return '{{ if eq .Role "user" }}' + said


def _answer(pieces: Pieces) -> str:
    before, after = map(_literal, pieces.answer)
    earlier, last = map(_literal, pieces.unthought)
    thought = earlier if earlier == last else _if("$last", last, _otherwise(pieces.unthought[0]))
    if (thinking := pieces.thinking) is not None:
        written = _literal(thinking.before) + _value(".Thinking") + _literal(thinking.after)
        known = "and $last .Thinking" if thinking.only_last else ".Thinking"
        thought = _if(known, written, "{{ else }}" + thought if thought else "")
    said = before + thought + _value(".Content") + _if("not $last", after)
    return '{{ else if eq .Role "assistant" }}' + said


def _value(name: str) -> str:
    return "{{ " + name + " }}"


def _if(condition: str, text: str, otherwise: str = "") -> str:
    if not text + otherwise:
        return ""
    return "{{ if " + condition + " }}" + text + otherwise + "{{ end }}"


def _otherwise(text: str) -> str:
    return "{{ else }}" + _literal(text) if text else ""


def _literal(text: str) -> str:
    """Return an action, or text, that writes a text of the template."""
    return _UNSAFE.sub(_quoted, text)


def _quoted(match: re.Match[str]) -> str:
    text = match[0]
    if text.isprintable() and text[0] not in '{"':
        return text
    return '{{ "' + "".join(_escaped(text)) + '" }}'


def _escaped(text: str) -> Iterable[str]:
    for character in text:
        if character in '"\\':
            yield "\\" + character
        else:
            yield character if character.isprintable() else f"\\U{ord(character):08x}"
