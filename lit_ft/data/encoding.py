"""Encoding: a conversation becomes token ids, and labels on what the assistant said.

Every assistant turn is learnt, with the token that ends it, and nothing else. In plain text, every
token is learnt. Labels follow the Hugging Face convention: unshifted, and -100 where there is
nothing to learn. The first label is always -100, since nothing predicts the first token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lit_ft.compat.refusal import located
from lit_ft.data.formats import Conversation, Message
from lit_ft.data.masks import assistant_mask
from lit_ft.data.rows import ParsedRow
from lit_ft.loss.targets import IGNORE_INDEX


class EncodedRow(NamedTuple):
    """One row's tokens and labels, and whether it was cut or dropped.

    A row is an example if `num_targets` is positive. Other rows stay in the table, so that they
    can be counted.

    Args:
        origin: The place of the row in its source, for errors (`my.jsonl:57`).
        input_ids: The token ids, [tokens]; empty if the row was dropped as too long.
        labels: The unshifted labels, [tokens]; -100 where there is nothing to learn.
        num_tokens: The number of token ids.
        num_targets: The number of labels that are not -100.
        truncated: Whether tokens were cut off at the end.
        overlong: Whether the row was dropped because it was too long.
        prompt: The messages before the last assistant turn; empty for plain text.
        held_out: Whether the row is for validation; None where the source leaves that open.
    """

    origin: str
    input_ids: list[int]
    labels: list[int]
    num_tokens: int
    num_targets: int
    truncated: bool
    overlong: bool
    prompt: list[Message]
    held_out: bool | None


@dataclass(frozen=True)
class EncodingReport:
    """Counts of the rows of one split, including every row that was cut or dropped.

    Args:
        examples: The number of rows that are trained or validated on.
        truncated: The number of examples that were cut at the maximum length.
        dropped_overlong: The number of rows left out because they are too long.
        dropped_without_targets: The number of rows left out because none of their tokens would be
            learnt.
        tokens: The number of tokens in the examples.
        targets: The number of tokens in the examples that are learnt.
    """

    examples: int = 0
    truncated: int = 0
    dropped_overlong: int = 0
    dropped_without_targets: int = 0
    tokens: int = 0
    targets: int = 0

    @classmethod
    def of(
        cls,
        num_tokens: NDArray[Any],
        num_targets: NDArray[Any],
        truncated: NDArray[Any],
        overlong: NDArray[Any],
    ) -> EncodingReport:
        """Count rows, given their columns, each [rows]."""
        kept = num_targets > 0
        return cls(
            examples=int(kept.sum()),
            truncated=int((truncated & kept).sum()),
            dropped_overlong=int(overlong.sum()),
            dropped_without_targets=int((~kept & ~overlong).sum()),
            tokens=int(num_tokens[kept].sum()),
            targets=int(num_targets[kept].sum()),
        )

    def __add__(self, other: EncodingReport) -> EncodingReport:
        return EncodingReport(
            *(getattr(self, one.name) + getattr(other, one.name) for one in fields(self))
        )

    def __str__(self) -> str:
        line = f"{self.examples:,} examples, {self.tokens:,} tokens, {self.targets:,} targets"
        notes = [
            (self.truncated, "truncated"),
            (self.dropped_overlong, "dropped as too long"),
            (self.dropped_without_targets, "dropped for want of a target"),
        ]
        return "; ".join([line, *(f"{count:,} {what}" for count, what in notes if count)])


@dataclass(frozen=True)
class Encoder:
    """Turns conversations into tokens and labels.

    Args:
        tokenizer: A fast tokenizer of transformers, whose chat template renders the chats.
        max_length: The largest number of tokens in an example, at least 2.
        drop_overlong: Whether to drop rows that are too long. Otherwise they are cut at the end.

    Raises:
        ValueError: If the tokenizer is not a fast one. Only fast ones know the characters of their
            tokens.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    drop_overlong: bool = False

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"{type(self.tokenizer).__name__} is not a fast tokenizer: load one that is backed "
                "by the tokenizers library"
            )

    def __call__(self, rows: Iterable[ParsedRow]) -> Iterator[EncodedRow]:
        """Yield each row encoded, in order.

        Raises:
            ValueError: If the tokenizer has no chat template or no end-of-text token, or if its
                template fails on a row or cannot tell the turns apart. Names the row.
        """
        return map(self._encode, rows)

    def _encode(self, row: ParsedRow) -> EncodedRow:
        try:
            if isinstance(row.conversation, str):
                ids = self._text(row.conversation)
                labels = list(ids)
            else:
                ids, labels = self._chat(row.conversation)
        except (ValueError, TemplateError) as error:
            raise located(error, row.origin) from error
        too_long = len(ids) > self.max_length
        keep = 0 if too_long and self.drop_overlong else self.max_length
        ids, labels = ids[:keep], labels[:keep]
        labels[:1] = [IGNORE_INDEX][: len(labels)]
        return EncodedRow(
            origin=row.origin,
            input_ids=ids,
            labels=labels,
            num_tokens=len(ids),
            num_targets=len(labels) - labels.count(IGNORE_INDEX),
            truncated=too_long and not self.drop_overlong,
            overlong=too_long and self.drop_overlong,
            prompt=prompt_of(row.conversation),
            held_out=row.held_out,
        )

    def _text(self, text: str) -> list[int]:
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise ValueError("the tokenizer has no end-of-text token: set tokenizer.eos_token")
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        return ids if ids[-1:] == [eos] else [*ids, eos]

    def _chat(self, messages: list[Message]) -> tuple[list[int], list[int]]:
        ids, is_target = assistant_mask(self.tokenizer, messages)
        pairs = zip(ids, is_target, strict=True)
        return ids, [token if target else IGNORE_INDEX for token, target in pairs]


def prompt_of(conversation: Conversation) -> list[Message]:
    """Return the messages before the last assistant turn; none for plain text."""
    if isinstance(conversation, str):
        return []
    turns = [place for place, turn in enumerate(conversation) if turn["role"] == "assistant"]
    return conversation[: turns[-1]] if turns else []


def load_chat_template(name: str) -> str:
    """Return the shipped template `plain`, or the text of the Jinja file `name`.

    Raises:
        ValueError: If `name` is neither of them.
    """
    shipped = files("lit_ft.data") / "templates" / f"{name}.jinja"
    if shipped.is_file():
        return shipped.read_text(encoding="utf-8")
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"chat_template={name}: neither `plain` nor a text file: {error}"
        ) from error
