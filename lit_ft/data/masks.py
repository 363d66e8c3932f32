"""Turn a chat into tokens, and choose the tokens that are learnt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from lit_ft.compat import remedies
from lit_ft.compat.refusal import Refusal
from lit_ft.data import notes
from lit_ft.data.conversation import Conversation
from lit_ft.data.rendering import CostlyTemplate
from lit_ft.data.turns import ChatTemplate, Rendering, Turn

TrainOn = Literal["assistant", "last", "all"] | Sequence[str]
"""The turns to learn: all answers, the last answer, every token, or the turns of some roles."""

ControlTokens = Literal["text", "keep", "refuse"]
"""What to do with a control token that somebody wrote into a message."""


class EncodedChat(NamedTuple):
    """The tokens of a chat.

    Args:
        ids: The token ids, [tokens].
        is_target: The mask of the learnt tokens, [tokens]: 1 if a token is learnt, otherwise 0.
        notes: The notes about the chat, which are counted over all rows; see `lit_ft.data.notes`.
    """

    ids: list[int]
    is_target: list[int]
    notes: list[str]


class _Tokens(NamedTuple):
    """Token ids and the characters [start, end) of each, all [tokens]."""

    ids: NDArray[np.int64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]

    def of(self, turn: Turn) -> NDArray[np.bool_]:
        """Return whether each token reaches into a turn, [tokens]."""
        return (self.starts < turn.last) & (self.ends > turn.first)


class ChatEncoder:
    """Turns chats into tokens, and chooses the tokens that are learnt.

    If a turn is learnt, the marker that ends it is learnt too. An answer, which is a turn of the
    assistant, begins after the prompt that opens it. The tokens before a learnt answer are the same
    as when the model is prompted for the answer.

    Args:
        template: The chat template, with its tokenizer.
        train_on: The turns to learn: "assistant" for all answers, "last" for the last answer,
            "all" for every token, or a list of roles. A message's own `train` takes precedence.
        control_tokens: What to do with a control token in the text of a message. "text" encodes it
            as ordinary text, "keep" keeps it as a token, and "refuse" refuses the chat.
        drop_unrendered: Whether a text that the template leaves out is dropped and counted.
            Otherwise the chat is refused. Reasoning in earlier answers is counted in either case,
            because many templates leave it out on purpose.
    """

    def __init__(
        self,
        template: ChatTemplate,
        *,
        train_on: TrainOn = "assistant",
        control_tokens: ControlTokens = "text",
        drop_unrendered: bool = False,
    ) -> None:
        self.template = template
        self.train_on = train_on
        self.control_tokens = control_tokens
        self.drop_unrendered = drop_unrendered
        tokenizer = template.tokenizer
        self._tokenizer: Any = tokenizer
        size = max(tokenizer.get_vocab().values()) + 1
        self._is_control = np.zeros(size, dtype=bool)
        # Tokenizers name only some of their control tokens, such as the end of text.
        added = tokenizer.added_tokens_decoder.items()
        self._is_control[tokenizer.all_special_ids] = True
        self._is_control[[id for id, token in added if token.special]] = True
        self._is_added = np.zeros(size, dtype=bool)
        self._is_added[list(tokenizer.get_added_vocab().values())] = True
        self._ids = lru_cache(10_000)(self._ids_of)
        self._prepared: dict[int, tuple[Conversation, Rendering, _Tokens]] = {}

    def prepare(self, chats: Iterable[Conversation]) -> None:
        """Tokenise several chats in one call, which uses all cores.

        When these chats are then encoded one by one, their tokens are ready. A chat that cannot be
        rendered is skipped here, and encoding it raises the error.
        """
        found = []
        for chat in chats:
            try:
                found.append((chat, self.template.find(chat)))
            except CostlyTemplate:
                raise
            except (ValueError, TemplateError):
                continue  # which is said when the chat is encoded
        texts = [rendering.text for _, rendering in found]
        tokens = self._tokenized(texts) if texts else []
        self._prepared = {
            id(chat): (chat, rendering, own)
            for (chat, rendering), own in zip(found, tokens, strict=True)
        }

    def __call__(self, chat: Conversation) -> EncodedChat:
        """Encode a chat.

        Raises:
            Refusal: If the template leaves out a text and `drop_unrendered` is false, if the turns
                cannot be found in the rendering, or if a message holds a control token and
                `control_tokens` is "refuse".
            TemplateError: If the template refuses the chat.
        """
        _, rendering, tokens = self._prepared.pop(id(chat), (chat, None, None))
        if rendering is None:
            rendering = self.template.find(chat)
        if tokens is None:
            [tokens] = self._tokenized([rendering.text])
        learnt = [turn for turn in rendering.turns if self._is_learnt(chat, turn)]
        said = [*self._notes_on_dropped(chat, rendering), *_notes_on_empty(chat, learnt)]
        tokens, apart = self._tokens_apart(chat, rendering, learnt, tokens)
        ids = tokens.ids.tolist()
        targets = self._targets(chat, rendering, learnt, tokens).tolist()
        said += [*apart, *self._notes_on_ends(rendering, learnt, ids, targets)]
        return EncodedChat(ids, targets, list(dict.fromkeys(said)))

    def _tokens_apart(
        self, chat: Conversation, rendering: Rendering, learnt: list[Turn], tokens: _Tokens
    ) -> tuple[_Tokens, list[str]]:
        """Return the tokens of a rendering, and notes about control tokens and prompts that merge.

        Args:
            chat: The chat.
            rendering: The rendering of the chat.
            learnt: The turns to learn.
            tokens: The tokens of the whole rendering, without cuts.
        """
        text, said = rendering.text, []
        written = list(self._written_controls(tokens, rendering))
        for first, last in written:
            token = text[first:last]
            if self.control_tokens == "refuse":
                raise Refusal(
                    f"a message holds the control token {token}", remedies.CONTROL_TOKENS_AS_TEXT
                )
            said.append(notes.control_token(token, kept=self.control_tokens == "keep"))
        plain = [] if self.control_tokens == "keep" else written
        if plain:
            tokens = self._tokens(text, [], plain)
        answers = [turn for turn in learnt if chat.messages[turn.message]["role"] == "assistant"]
        cuts = [turn.first for turn in answers if not self._is_prompted_so(rendering, tokens, turn)]
        if cuts:
            said.append(notes.PROMPT_MERGES)
            tokens = self._tokens(text, cuts, plain)
        return tokens, said

    def _targets(
        self, chat: Conversation, rendering: Rendering, learnt: list[Turn], tokens: _Tokens
    ) -> NDArray[np.int64]:
        """Return 1 where a token is learnt, [tokens]."""
        everything = self.train_on == "all"
        is_target = np.full(len(tokens.ids), int(everything), dtype=np.int64)
        if everything:
            for turn in rendering.turns:
                if chat.messages[turn.message].get("train") is False:
                    is_target[tokens.of(turn)] = 0
        for turn in learnt:
            is_target[tokens.of(turn)] = 1
        return is_target

    def _is_learnt(self, chat: Conversation, turn: Turn) -> bool:
        message = chat.messages[turn.message]
        if (own := message.get("train")) is not None:
            return bool(own)
        role: str = message["role"]
        if self.train_on == "last":
            later = chat.messages[turn.message + 1 :]
            return role == "assistant" and all(one["role"] != "assistant" for one in later)
        if self.train_on in ("assistant", "all"):
            return role == "assistant"
        return role in self.train_on

    def _notes_on_dropped(self, chat: Conversation, rendering: Rendering) -> list[str]:
        """Return notes about what the template leaves out, or refuse the row."""
        said = [notes.changed(chat.messages[t.message]["role"], t.field) for t in rendering.changed]
        answers = [i for i, one in enumerate(chat.messages) if one["role"] == "assistant"]
        for text in rendering.dropped:
            role = chat.messages[text.message]["role"]
            where = "" if text.field == "tools" else f" of message {text.message} ({role})"
            content = chat.messages[text.message]["content"]
            is_thought = text.field == "reasoning_content" or (
                text.field == "content" and "</think>" in content
            )
            by_design = is_thought and text.message in answers[:-1]
            if not (self.drop_unrendered or by_design):
                raise Refusal(
                    f"the chat template leaves out {notes.FIELDS[text.field]}{where}: "
                    f"{text.text!r:.60}",
                    remedies.OTHER_TEMPLATE,
                    remedies.DROP_UNRENDERED,
                )
            said.append(notes.dropped(role, text.field, earlier=by_design))
        return said

    def _notes_on_ends(
        self, rendering: Rendering, learnt: list[Turn], ids: list[int], targets: list[int]
    ) -> list[str]:
        """Return notes on learnt turns without an end token, and add one to the last turn."""
        said = []
        for turn in learnt:
            if not turn.end:
                said.append(notes.NO_END)
                eos = self._tokenizer.eos_token_id
                is_last = turn is learnt[-1] and not rendering.text[turn.last :].strip()
                if is_last and eos is not None and ids[-1:] != [eos]:
                    ids.append(eos)
                    targets.append(1)
                    said[-1] = notes.EOS_ADDED
            elif len(self._ids(turn.end)) != 1:
                said.append(notes.end_of_several_tokens(turn.end))
        return said

    def _written_controls(self, tokens: _Tokens, rendering: Rendering) -> Iterable[tuple[int, int]]:
        """Yield the places [first, last) of control tokens in the texts of messages."""
        for place in np.flatnonzero(self._is_control[tokens.ids]):
            first, last = int(tokens.starts[place]), int(tokens.ends[place])
            token = self._tokenizer.convert_ids_to_tokens(int(tokens.ids[place]))
            if token not in rendering.text[first:last]:
                continue  # the token for unknown words, which the text does not contain
            if any(a <= first and last <= b for a, b in rendering.texts):
                yield first, last

    def _is_prompted_so(self, rendering: Rendering, tokens: _Tokens, turn: Turn) -> bool:
        """Whether the tokens before an answer are the same if the prompt is tokenised alone."""
        ahead = int(np.searchsorted(tokens.ends, turn.first, side="right"))
        start = ahead - 1
        while start > 0 and not self._is_added[tokens.ids[start]]:
            start -= 1
        # No token spans an added token, so it is enough to compare from the last one on.
        start = max(start, 0)
        prompt = self._ids(rendering.text[int(tokens.starts[start]) : turn.first]) if ahead else ()
        return tuple(tokens.ids[start:ahead].tolist()) == tuple(prompt) and (
            ahead == len(tokens.ids) or int(tokens.starts[ahead]) >= turn.first
        )

    def _ids_of(self, text: str) -> tuple[int, ...]:
        encoded = self._tokenizer(text, add_special_tokens=False, verbose=False)
        return tuple(encoded["input_ids"])

    def _tokens(self, text: str, cuts: Sequence[int], plain: Sequence[tuple[int, int]]) -> _Tokens:
        """Tokenise a text in pieces.

        Args:
            text: The text to tokenise.
            cuts: The indices of the characters before which the text is cut. No token spans a cut.
            plain: The pieces [first, last) of the text in which control tokens are ordinary text.
        """
        edges = sorted({0, len(text), *cuts, *(edge for piece in plain for edge in piece)})
        pieces = []
        for first, last in zip(edges, edges[1:], strict=False):
            [piece] = self._tokenized([text[first:last]], plain=(first, last) in plain)
            pieces.append(_Tokens(piece.ids, piece.starts + first, piece.ends + first))
        return _Tokens(*map(np.concatenate, zip(*pieces, strict=True)))

    def _tokenized(self, texts: list[str], *, plain: bool = False) -> list[_Tokens]:
        """Tokenise several texts; with `plain`, control tokens in them are ordinary text."""
        encoded = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=True,
            verbose=False,
            split_special_tokens=plain,
        )
        return [
            _as_tokens(ids, offsets)
            for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ]


def _as_tokens(ids: list[int], offsets: list[tuple[int, int]]) -> _Tokens:
    flat = np.fromiter(chain.from_iterable(offsets), dtype=np.int64, count=2 * len(offsets))
    return _Tokens(np.array(ids, dtype=np.int64), flat[::2], flat[1::2])


def _notes_on_empty(chat: Conversation, learnt: list[Turn]) -> list[str]:
    """Return notes about learnt turns that say nothing."""
    messages = [chat.messages[turn.message] for turn in learnt]
    return [
        notes.EMPTY_ANSWER
        for message in messages
        if not message["content"].strip() and not message.get("tool_calls")
    ]
