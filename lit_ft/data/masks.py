"""Find the tokens of a chat that the assistant says, by its template's marks or its prefixes."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from transformers import BatchEncoding, PreTrainedTokenizerBase

from lit_ft.compat import remedies
from lit_ft.compat.refusal import Refusal
from lit_ft.data.formats import Message

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TEMPLATES = (remedies.MARKED_TEMPLATE, remedies.PLAIN_TEMPLATE)


def assistant_mask(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message]
) -> tuple[list[int], Sequence[int]]:
    """Return a chat's token ids, [tokens], and a mask, [tokens], of 1 where the assistant speaks.

    Raises:
        Refusal: If the tokenizer has no chat template, or one whose turns cannot be told apart.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str):
        raise Refusal("the tokenizer has no chat template", *_TEMPLATES)
    mark = _mark_by_template if GENERATION_MARK.search(template) else _mark_by_prefix
    return mark(tokenizer, messages)


def _mark_by_template(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message]
) -> tuple[list[int], Sequence[int]]:
    """Return a chat's token ids and 1 where the template says that the assistant speaks."""
    encoded = tokenizer.apply_chat_template(
        messages,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"verbose": False},
    )
    assert isinstance(encoded, BatchEncoding)
    return encoded["input_ids"], encoded["assistant_masks"]


def _mark_by_prefix(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message]
) -> tuple[list[int], Sequence[int]]:
    """Return the same for a template without marks, by what each turn adds to the text."""
    text = _render(tokenizer, messages)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts, ends = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
    is_target = np.zeros(len(starts), dtype=np.int64)
    for first, last in _assistant_spans(tokenizer, messages, text):
        # A token that only reaches into the turn counts, as it does in transformers' own mask.
        is_target |= (starts < last) & (ends > first)
    return encoded["input_ids"], is_target.tolist()


def _assistant_spans(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], text: str
) -> list[tuple[int, int]]:
    """Find the characters [first, last) of each assistant turn in a rendered chat.

    Raises:
        Refusal: If the chat begins with the assistant, or if the template renders the beginning of
            a chat differently when more turns follow.
    """
    end_tokens = tuple(tokenizer.get_added_vocab())
    spans = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if place == 0:
            raise Refusal("the chat begins with the assistant, not with a user", *_TEMPLATES)
        before = _render(tokenizer, messages[:place], add_generation_prompt=True)
        through = _render(tokenizer, messages[: place + 1])
        if not (text.startswith(through) and through.startswith(before)):
            raise Refusal(
                f"the chat template renders message {place} differently at the end of a chat than "
                "inside it, so its tokens cannot be found",
                *_TEMPLATES,
            )
        # The newline that templates put after the end of a turn is no part of it.
        turn = through.rstrip()
        spans.append((len(before), len(turn if turn.endswith(end_tokens) else through)))
    return spans


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    *,
    add_generation_prompt: bool = False,
) -> str:
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert isinstance(text, str)
    return text
