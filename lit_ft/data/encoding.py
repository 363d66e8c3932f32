"""Encoding: the content of a row becomes token ids and labels.

By default, the model learns every assistant turn of a chat, with the token that ends the turn, and
nothing else. `train_on` or the row itself can change this. In plain text, the model learns every
token. Labels follow the Hugging Face convention: they are unshifted, and -100 where there is
nothing to learn. The first label is always -100, because no token predicts the first one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cached_property
from importlib.resources import files
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lit_ft.compat.refusal import Refusal, located
from lit_ft.data import notes
from lit_ft.data.conversation import Content, Conversation, chat_of, prompt_of
from lit_ft.data.encoded import EncodedRow
from lit_ft.data.files import other_than_file
from lit_ft.data.formats.chat import ROLES
from lit_ft.data.masks import ChatEncoder, ControlTokens, TrainOn
from lit_ft.data.rendering import CostlyTemplate
from lit_ft.data.rows import ParsedRow
from lit_ft.data.turns import ChatTemplate
from lit_ft.loss.targets import IGNORE_INDEX

AT_ONCE = 64
"""The number of rows that are tokenised in one call, which uses all cores."""

Overlong = Literal["drop", "cut", "cut_left", "split"]
"""What to do with a row that is too long: leave it out, cut its end or its start, or split it."""


@dataclass(frozen=True)
class Encoder:
    """Turns the content of rows into tokens and labels.

    Args:
        tokenizer: A fast tokenizer of transformers, whose chat template renders the chats.
        max_length: The largest number of tokens in an example, at least 2.
        overlong: What to do with a row that is too long. "drop" leaves it out, "cut" cuts off its
            end, and "cut_left" cuts off its start. "split" makes several examples of it: a text
            loses no token, and a chat is split before turns of the user. A part of a chat that is
            still too long is left out.
        train_on: The turns to learn: "assistant" for all answers, "last" for the last answer,
            "all" for every token, or a list of roles. A message's own `train` takes precedence.
        control_tokens: What to do with a control token in the text of a message. "text" encodes it
            as ordinary text, "keep" keeps it as a token, and "refuse" treats the row as bad.
        learn_empty_think: Whether an empty thinking block before an answer is learnt.
        drop_unrendered: Whether a text that the chat template leaves out is dropped and counted.
            Otherwise its row is treated as bad, unless the text is reasoning in an earlier answer.
        bad_rows: What to do with a row that cannot be read or encoded. "stop" raises its error, and
            "skip" leaves it out and counts it.
        worded: What words the error of a row that is skipped.

    Raises:
        ValueError: If the tokenizer is not a fast one, because only fast tokenizers know which
            characters a token stands for, or if the value of an argument is unknown.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    overlong: Overlong = "cut"
    train_on: TrainOn = "assistant"
    control_tokens: ControlTokens = "text"
    learn_empty_think: bool = False
    drop_unrendered: bool = False
    bad_rows: Literal["stop", "skip"] = "stop"
    worded: Callable[[BaseException], str] = str

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"{type(self.tokenizer).__name__} is not a fast tokenizer: load one that is backed "
                "by the tokenizers library"
            )
        chosen(overlong=self.overlong, control_tokens=self.control_tokens, bad_rows=self.bad_rows)
        turns_to_learn(self.train_on)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that determine the encoded rows, apart from the tokenizer."""
        apart = ("tokenizer", "worded")
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name not in apart}

    def __call__(self, rows: Iterable[ParsedRow]) -> Iterator[EncodedRow]:
        """Yield the encoded rows in order. A row that is split gives several of them.

        Raises:
            ValueError: If a row is bad and `bad_rows` is "stop". A row is bad if it could not be
                read, if the tokenizer lacks the chat template or the end-of-text token that the row
                needs, if the template fails on it, or if `ChatEncoder` refuses it. The message
                names the row.
        """
        rows = iter(rows)
        while several := list(islice(rows, AT_ONCE)):
            contents = [_as_chat(row.content) for row in several]
            with suppress(Refusal):  # without a chat template, each chat raises this below
                self._chat.prepare(one for one in contents if isinstance(one, Conversation))
            for row, content in zip(several, contents, strict=True):
                try:
                    yield from self._encode(row, content)
                except CostlyTemplate:
                    raise  # each other row would take as long
                except (ValueError, TemplateError) as error:
                    bad = located(error, row.origin)
                    if self.bad_rows == "stop":
                        raise bad from error
                    yield EncodedRow(row.origin, held_out=row.held_out, error=self.worded(bad))

    @cached_property
    def _chat(self) -> ChatEncoder:
        template = ChatTemplate(self.tokenizer, learn_empty_thinking=self.learn_empty_think)
        return ChatEncoder(
            template,
            train_on=self.train_on,
            control_tokens=self.control_tokens,
            drop_unrendered=self.drop_unrendered,
        )

    def _encode(self, row: ParsedRow, content: Content | ValueError) -> Iterator[EncodedRow]:
        if isinstance(content, ValueError):
            raise content
        said = [notes.unread(key) for key in row.unread]
        if isinstance(content, Conversation):
            yield from self._chat_rows(row, content, said)
            return
        if isinstance(content, str):
            ids = self._text(content)
            labels = list(ids)
        else:
            ids, labels = self._segments(content)
        if len(ids) > self.max_length and self.overlong == "split":
            # The last token of a piece is also the first of the next one, where it is only context.
            # So each token is learnt once.
            for start in range(0, len(ids) - 1, self.max_length - 1):
                piece = slice(start, start + self.max_length)
                whole = 0 if start else len(ids)
                yield self._row(row, ids[piece], labels[piece], [*said, notes.SPLIT], whole=whole)
            return
        yield self._row(row, ids, labels, said, whole=len(ids))

    def _chat_rows(
        self, row: ParsedRow, chat: Conversation, said: list[str]
    ) -> Iterator[EncodedRow]:
        encoded = self._chat(chat)
        whole = len(encoded.ids)
        parts = [chat]
        if len(encoded.ids) > self.max_length and self.overlong == "split":
            parts = list(self._parts(chat))
            said = [*said, notes.SPLIT] if len(parts) > 1 else said
        for part in parts:
            if part is not chat:
                encoded = self._chat(part)
            pairs = zip(encoded.ids, encoded.is_target, strict=True)
            labels = [token if target else IGNORE_INDEX for token, target in pairs]
            told = [*said, *encoded.notes]
            yield self._row(row, encoded.ids, labels, told, whole=whole, chat=part)
            whole = 0

    def _parts(self, chat: Conversation) -> Iterator[Conversation]:
        """Split a chat before turns of the user, into the longest parts that fit."""
        messages = list(chat.messages)
        if self.train_on == "last":
            last = len(prompt_of(chat))  # the last answer of the chat, not of each part
            messages = [
                {"train": i == last, **one} if one["role"] == "assistant" else one
                for i, one in enumerate(messages)
            ]
        roles = [one["role"] for one in messages]
        told = list(takewhile(("system", "developer").__contains__, roles))
        preamble = messages[: len(told)]  # each part repeats the system messages
        starts = [
            len(told),
            *(
                i
                for i in range(len(told) + 1, len(roles))
                if roles[i] == "user" and roles[i - 1] != "user"
            ),
        ]
        exchanges = [
            messages[a:b] for a, b in zip(starts, [*starts[1:], len(messages)], strict=True)
        ]

        def part(turns: list[Any]) -> Conversation:
            return Conversation([*preamble, *turns], chat.tools, chat.template_options)

        turns: list[Any] = []
        for exchange in exchanges:
            longer = [*turns, *exchange]
            if turns and len(self._chat(part(longer)).ids) > self.max_length:
                yield part(turns)
                longer = exchange
            turns = longer
        yield part(turns)

    def _row(
        self,
        row: ParsedRow,
        ids: list[int],
        labels: list[int],
        said: list[str],
        *,
        whole: int,
        chat: Conversation | None = None,
    ) -> EncodedRow:
        too_long = len(ids) > self.max_length
        is_cut = too_long and self.overlong in ("cut", "cut_left")
        if is_cut and self.overlong == "cut_left":
            ids, labels = ids[-self.max_length :], labels[-self.max_length :]
        elif too_long:
            keep = self.max_length if is_cut else 0
            ids, labels = ids[:keep], labels[:keep]
        labels[:1] = [IGNORE_INDEX][: len(labels)]
        prompt = [] if chat is None else list(prompt_of(chat))
        return EncodedRow(
            origin=row.origin,
            input_ids=ids,
            labels=labels,
            num_tokens=len(ids),
            row_tokens=whole,
            num_targets=len(labels) - labels.count(IGNORE_INDEX),
            truncated=is_cut,
            overlong=too_long and not is_cut,
            prompt=json.dumps(prompt) if prompt else "",
            held_out=row.held_out,
            notes=said,
            digest=_digest(ids, labels),
        )

    def _text(self, text: str) -> list[int]:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if eos is None:
            raise ValueError("the tokenizer has no end-of-text token: set tokenizer.eos_token")
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        if bos is not None and ids[:2] == [bos, bos] and text.startswith(self.tokenizer.bos_token):
            ids = ids[1:]  # the text already begins with the token
        return ids if ids[-1:] == [eos] else [*ids, eos]

    def _segments(self, segments: Any) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        for segment in segments:
            own = self.tokenizer(segment.text, add_special_tokens=False, verbose=False)["input_ids"]
            ids += own
            labels += own if segment.label else [IGNORE_INDEX] * len(own)
        return ids, labels


def _as_chat(content: Content | ValueError) -> Content | ValueError:
    """Return the content as a chat if it is one, and unchanged otherwise."""
    chat = None if isinstance(content, ValueError) else chat_of(content)
    return content if chat is None else chat


def chosen(**choices: Any) -> dict[str, Any]:
    """Return `choices` unchanged, after checking that their values are known.

    Args:
        **choices: The values of `overlong`, `control_tokens` and `bad_rows` to check.

    Raises:
        ValueError: If a value is unknown. The message names the known values.
    """
    known = {
        "overlong": get_args(Overlong),
        "control_tokens": get_args(ControlTokens),
        "bad_rows": ("stop", "skip"),
    }
    for name, value in choices.items():
        if value not in known[name]:
            others = " or ".join(known[name])
            raise ValueError(f"{name}={value}: there is no such choice. Use {others}.")
    return choices


def turns_to_learn(train_on: TrainOn) -> TrainOn:
    """Return `train_on` with its roles as a tuple, after checking that they are known.

    Raises:
        ValueError: If a role or the choice is unknown. The message names the known ones.
    """
    if train_on in ("assistant", "last", "all"):
        return train_on
    roles = dict.fromkeys(ROLES.values())
    if isinstance(train_on, str) or not train_on or not set(train_on) <= set(roles):
        raise ValueError(
            f"train_on={train_on}: use assistant, last or all, or a list of these roles: "
            f"{', '.join(roles)}."
        )
    return tuple(train_on)


def _digest(ids: list[int], labels: list[int]) -> int:
    content = np.array([ids, labels], dtype=np.int64).tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), signed=True)


def load_chat_template(name: str) -> str:
    """Return the shipped template `plain`, or the text of the Jinja file `name`.

    Raises:
        ValueError: If `name` is neither `plain` nor the path of a text file.
    """
    shipped = files("lit_ft.data") / "templates" / f"{name}.jinja"
    if shipped.is_file():
        return shipped.read_text(encoding="utf-8")
    path = Path(name).expanduser()
    try:
        if (kind := other_than_file(path)) not in (None, "missing"):
            raise OSError(f"it is {kind}")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"chat_template={name}: neither `plain` nor a text file: {error}"
        ) from error
