"""Split token ids into pieces of text, to show people the tokens that a model sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from lit_ft.loss.targets import IGNORE_INDEX


class Piece(NamedTuple):
    """A piece of text that is as short as whole tokens and whole characters allow.

    Args:
        text: The text of the piece.
        ids: The token ids of the piece. There are several if one character takes several tokens.
        is_learnt: Whether any token of the piece is learnt.
        is_control: Whether the piece is a control token, such as the end of a turn.
    """

    text: str
    ids: tuple[int, ...]
    is_learnt: bool
    is_control: bool


def pieces(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], labels: Sequence[int]
) -> Iterator[Piece]:
    """Yield the pieces of an example, in order.

    Args:
        tokenizer: A fast tokenizer of transformers.
        ids: The token ids, [tokens].
        labels: The unshifted labels, [tokens]; -100 where there is nothing to learn.
    """
    backend: Any = tokenizer.backend_tokenizer
    control = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    stream = DecodeStream(skip_special_tokens=False)
    waiting: list[int] = []
    is_learnt = False
    for id, label in zip(ids, labels, strict=True):
        waiting.append(id)
        is_learnt |= label != IGNORE_INDEX
        if (text := stream.step(backend, id)) is not None:
            yield Piece(text, tuple(waiting), is_learnt, id in control)
            waiting, is_learnt = [], False
    if waiting:  # the row is cut inside a character
        yield Piece(str(tokenizer.decode(waiting)), tuple(waiting), is_learnt, False)
