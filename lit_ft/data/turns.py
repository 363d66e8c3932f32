"""Find the turns of a chat in the text that its chat template renders.

The method is the same for all templates. Each text of a chat is replaced by a mark of its own, and
the template renders the marks. Split at the marks, this rendering gives the template's own words,
such as the prompt that opens an answer and the marker that ends a turn. The words and the original
texts together must give the rendering of the original chat, so no place is guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import takewhile
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from lit_ft.compat import remedies
from lit_ft.compat.refusal import Refusal
from lit_ft.data.conversation import Conversation, Message
from lit_ft.data.marks import (
    EMPTY_TEXTS,
    Text,
    Words,
    chat_of_key,
    key_of,
    mark_texts,
    put_back,
    split_at_marks,
    unused_stem,
)
from lit_ft.data.rendering import CostlyTemplate, bounded_rendering

_TEMPLATES = (remedies.MARKED_TEMPLATE, remedies.PLAIN_TEMPLATE)
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_EMPTY_THINKING = re.compile(r"\s*(?:<think>)?\s*</think>\s*")
# The shape of control tokens, for templates that were written for another tokenizer.
_CONTROL = r"<[^<>\s]{1,60}>|\[/?[A-Z_]{2,30}\]"
_RENDER: Any = render_jinja_template  # Any, because its annotations are too narrow
_KEPT = 1_000  # structures of chats in memory; calls make them long


class Turn(NamedTuple):
    """A turn in a rendered chat.

    Args:
        message: The index of the message in the chat.
        first: The index of the first character that the author of the turn writes. In an answer, it
            is the character after the prompt that opens the answer.
        last: The index of the character after the marker that ends the turn, or after the text of
            the turn if there is no marker.
        end: The marker that ends the turn; empty if there is none.
    """

    message: int
    first: int
    last: int
    end: str


@dataclass(frozen=True)
class Rendering:
    """A rendered chat.

    Args:
        text: The text as the template renders it.
        turns: The turns in it, in order.
        texts: The places [first, last) of the messages' texts, as indices of characters.
        dropped: The texts that the template leaves out.
        changed: The texts that the template writes in another way, such as with JSON's escapes.
    """

    text: str
    turns: Sequence[Turn]
    texts: Sequence[tuple[int, int]]
    dropped: Sequence[Text]
    changed: Sequence[Text]


class _Place(NamedTuple):
    """A place in the template's words: the number of a word, and an offset in it."""

    word: int
    offset: int


class _Structure(NamedTuple):
    """The words and turns that chats share if only their texts differ."""

    words: Words
    turns: list[tuple[int, _Place, _Place, str]]


class ChatTemplate:
    """The chat template of a tokenizer, which can find the turns of a chat.

    Args:
        tokenizer: A tokenizer of transformers that has a chat template. If it has several templates
            with names, `tool_use` renders chats with tools, and `default` renders all others.
        learn_empty_thinking: Whether an empty thinking block is part of an answer. Otherwise the
            answer begins after it.

    Raises:
        Refusal: If the tokenizer has no chat template.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, learn_empty_thinking: bool = False
    ) -> None:
        named = tokenizer.chat_template
        template = named.get("default") if isinstance(named, Mapping) else named
        if not isinstance(template, str):
            raise Refusal("the tokenizer has no chat template", *_TEMPLATES)
        self.tokenizer = tokenizer
        self.learn_empty_thinking = learn_empty_thinking
        self._for_tools = (
            named.get("tool_use", template) if isinstance(named, Mapping) else template
        )
        self.marks_answers = bool(_GENERATION_MARK.search(template))
        self._template = template
        # gpt-oss reads an assistant's reasoning under another name.
        self._reads_thinking = "reasoning_content" not in template and "thinking" in template
        self._needs_middle = False
        self._reads_parts = self._wants_parts()
        added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._control = re.compile("|".join([*map(re.escape, added), _CONTROL]))
        self._structure = lru_cache(_KEPT)(self._find_structure)
        self._words = lru_cache(_KEPT)(self._render_marks)

    def render(self, chat: Conversation, *, add_generation_prompt: bool = False) -> str:
        """Return a chat as the template renders it.

        Args:
            chat: The chat to render.
            add_generation_prompt: Whether to add the prompt that opens the next answer.

        Raises:
            CostlyTemplate: If the template takes too long, or too much memory.
            TemplateError: If the template refuses the chat.
        """
        return self._render(chat, add_generation_prompt=add_generation_prompt)[0]

    def find(self, chat: Conversation) -> Rendering:
        """Return the rendering of a chat with the places of its turns.

        Raises:
            Refusal: If the template writes the texts in a way in which they cannot be found again.
            TemplateError: If the template refuses the chat.
        """
        try:
            return self._find(chat)
        except Refusal:
            if "strftime_now" not in self._template + self._for_tools:
                raise
        # The template writes the date, which changes if the run continues past midnight.
        self._structure.cache_clear()
        self._words.cache_clear()
        return self._find(chat)

    def _find(self, chat: Conversation) -> Rendering:
        text, answers = self._render(chat)
        stem = unused_stem(text)
        for empty in EMPTY_TEXTS:
            marked, texts = mark_texts(chat, stem, empty=empty)
            structure = self._structure(key_of(marked), stem)
            found = put_back(text, structure.words, texts)
            if found is not None:
                break
        else:
            raise Refusal(
                "the chat template changes what the messages say, so the answers cannot be found",
                *_TEMPLATES,
            )
        starts, spans, changed = found
        shown = {number for _, number in structure.words.marks}
        dropped = [one for k, one in enumerate(texts) if k not in shown and one.text]
        if chat.tools and self._ignores_tools(marked, structure.words, stem):
            dropped.append(Text(0, "tools", json.dumps(chat.tools)))
        turns = [
            Turn(i, starts[a.word] + a.offset, starts[b.word] + b.offset, end)
            for i, a, b, end in structure.turns
        ]
        return Rendering(
            text=text,
            turns=self._as_marked(turns, answers, chat) if self.marks_answers else turns,
            texts=spans,
            dropped=dropped,
            changed=changed,
        )

    def _ignores_tools(self, marked: Conversation, words: Words, stem: str) -> bool:
        without = Conversation(marked.messages, None, marked.template_options)
        return self._begun(without, marked.messages, stem, False) == words

    def _render(
        self, chat: Conversation, *, add_generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return a chat's rendering, and the places of its `{% generation %}` blocks."""
        try:
            with bounded_rendering(self.tokenizer):
                texts, answers = _RENDER(
                    [[self._readable(message) for message in chat.messages]],
                    tools=None if chat.tools is None else list(chat.tools),
                    chat_template=self._for_tools if chat.tools else self._template,
                    return_assistant_tokens_mask=self.marks_answers,
                    add_generation_prompt=add_generation_prompt,
                    **{**self.tokenizer.special_tokens_map, **chat.template_options},
                )
        except (TypeError, LookupError, AttributeError) as error:  # of the template's own code
            raise TemplateError(f"the chat template cannot render this chat: {error}") from error
        return texts[0], answers[0] if self.marks_answers else []

    def _readable(self, message: Message) -> Message:
        message = {name: value for name, value in message.items() if name != "train"}
        if self._reads_thinking and "reasoning_content" in message:
            message["thinking"] = message.pop("reasoning_content")
        if self._reads_parts:
            message["content"] = [{"type": "text", "text": message["content"]}]
        return message

    def _wants_parts(self) -> bool:
        """Whether the template renders content only as a list of parts, as for images."""
        text = unused_stem()
        for self._reads_parts in (False, True):
            try:
                if text in self.render(Conversation([{"role": "user", "content": text}])):
                    return self._reads_parts
            except TemplateError:
                continue
        return False

    def _as_marked(
        self, turns: list[Turn], answers: list[tuple[int, int]], chat: Conversation
    ) -> list[Turn]:
        """Return the turns, with answers cut to the template's `{% generation %}` blocks."""
        marked = []
        for turn in turns:
            if chat.messages[turn.message]["role"] != "assistant":
                marked.append(turn)
                continue
            # The blocks decide, but the prompt that opens an answer is never part of it.
            parts = [
                (max(first, turn.first), min(last, turn.last))
                for first, last in answers
                if first < turn.last and last > turn.first
            ]
            marked += [
                Turn(turn.message, first, last, turn.end if last == turn.last else "")
                for first, last in _joined(parts)
            ]
        return marked

    def _find_structure(self, key: str, stem: str) -> _Structure:
        chat = chat_of_key(key)
        words = self._words(key, stem, False)
        turns = []
        for i, message in enumerate(chat.messages):
            places = [k for k, (owner, _) in enumerate(words.marks) if owner == i]
            if not places:
                continue
            ahead = words.words[places[0]]
            if message["role"] == "assistant":
                begins = self._answer_begins(chat, i, words, places[0], stem)
            else:
                space = message["content"].partition(stem)[0]  # which some templates strip
                begins = len(ahead.removesuffix(space)) if not space.strip() else len(ahead)
            first = _Place(places[0], begins)
            last, end = self._turn_ends(chat, i, words, places, stem)
            turns.append((i, first, last, end))
        return _Structure(words, turns)

    def _answer_begins(
        self, chat: Conversation, i: int, words: Words, place: int, stem: str
    ) -> int:
        """Return the offset in the word before an answer at which the prompt for it ends."""
        ahead, begins = words.words[place], -1
        before = self._alone(chat, i, stem, True)
        if before.marks and before.marks[-1:] == words.marks[max(place - 1, 0) : place]:
            begins = len(self.common(ahead, before.words[-1]))
        begins = max(begins, self._after_opening(ahead, whole=begins >= 0))
        thinking = _EMPTY_THINKING.match(ahead, begins)
        return thinking.end() if thinking and not self.learn_empty_thinking else begins

    def _after_opening(self, ahead: str, *, whole: bool) -> int:
        """Return the offset in `ahead` at which the usual prompt for an answer ends.

        With `whole`, it is -1 if the prompt does not occur. Otherwise the longest beginning of the
        prompt counts too, and the offset is the length of `ahead` if there is none.
        """
        opening = self._usual[2]
        for length in range(len(opening), len(opening) - 1 if whole else 0, -1):
            beginning = "".join(opening[:length])
            if beginning and (at := ahead.rfind(beginning)) >= 0:
                return at + len(beginning)
        return -1 if whole else len(ahead)

    def _turn_ends(
        self, chat: Conversation, i: int, words: Words, places: list[int], stem: str
    ) -> tuple[_Place, str]:
        """Return the place after a turn, and the marker that ends the turn."""
        calls = bool(chat.messages[i].get("tool_calls"))
        alone = self._alone(chat, i + 1, stem, False) if calls else Words([""], [])
        if calls and (shown := sum(owner == i for owner, _ in alone.marks)):
            places = places[:shown]  # a tool's answer may repeat the name of the function
        word = places[-1] + 1
        after = words.words[word]
        inside, at_end, _ = self._usual
        ends = (at_end, inside) if word + 1 == len(words.words) else (inside, at_end)
        if not calls:
            # White space, which some templates strip, and tags may follow the last text.
            tail = chat.messages[i]["content"].rpartition(stem)[2]
            for own in dict.fromkeys((tail, tail.rstrip(), "")):
                for end in filter(None, ends):
                    if after.startswith(own + end):
                        return _Place(word, len(own + end)), self.last_control(end)
            return _Place(word, 0), ""
        same = alone.marks[-1:] == words.marks[word - 1 : word]
        common = self.common(after, alone.words[-1]) if same else ""
        if controls := list(self._control.finditer(common)):
            return _Place(word, controls[-1].end()), controls[-1].group()
        for end in filter(None, ends):
            if end in after:
                return _Place(word, after.index(end) + len(end)), self.last_control(end)
        return _Place(word, 0), ""

    def _alone(self, chat: Conversation, length: int, stem: str, prompt: bool) -> Words:
        """Return the words of the first messages alone; no words if the template refuses them."""
        messages = chat.messages[:length]
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        calls = any(message.get("tool_calls") for message in messages)
        if not calls or len(answers) < 3 or self._needs_middle:
            return self._begun(chat, messages, stem, prompt)
        # The arguments of calls give each chat a structure of its own. To render all beginnings of
        # a long chat takes quadratic time, and the middle says nothing about the end.
        short = self._begun(chat, [*messages[: answers[0]], *messages[answers[-1] :]], stem, prompt)
        if len(answers) == 3 or not short.marks:
            whole = self._begun(chat, messages, stem, prompt)
            last = answers[-1]
            self._needs_middle = _end_of(short, last) != _end_of(whole, last)
            return whole
        return short

    def _begun(
        self, chat: Conversation, messages: Sequence[Message], stem: str, prompt: bool
    ) -> Words:
        start = Conversation(messages, chat.tools, chat.template_options)
        try:
            return self._words(key_of(start), stem, prompt)
        except TemplateError:  # not every template renders any beginning
            return Words([""], [])

    @cached_property
    def _usual(self) -> tuple[str, str, list[str]]:
        """The end markers of turns inside a chat and at its end, and the prompt for an answer."""
        stem = unused_stem()
        user, answer = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}

        def words(messages: list[Message], prompt: bool = False) -> list[str]:
            marked, _ = mark_texts(Conversation(messages), stem)
            return self._words(key_of(marked), stem, prompt).words

        try:
            inside, at_end = words([user, answer, user])[2], words([user, answer])[2]
            opened, closed = words([user], True)[-1], words([user])[-1]
        except TemplateError:
            return "", "", []
        opening = self._atoms(opened.removeprefix(self.common(opened, closed)))
        common = self.common(inside, at_end)
        if controls := list(self._control.finditer(common)):
            common = common[: controls[-1].end()]
        elif first := self._control.search(at_end):  # the last turn ends with another token
            other = self._control.search(inside)
            return inside[: other.end()] if other else "", at_end[: first.end()], opening
        return common, common, opening

    def end_tokens(self) -> list[int]:
        """Return the ids of the tokens that end an answer; empty if no single token does."""
        ids = [self.tokenizer.encode(end, add_special_tokens=False) for end in self.ends]
        return list(dict.fromkeys(id for one in ids for id in one if len(one) == 1))

    @property
    def ends(self) -> list[str]:
        """The markers that end an answer, inside a chat and at its end, and end nothing else."""
        ends = [end for text in self._usual[:2] if (end := self.last_control(text))]
        return [end for end in dict.fromkeys(ends) if end not in self._after_thoughts] or ends

    @cached_property
    def _after_thoughts(self) -> str:
        """What stands between the thoughts of an answer and its text."""
        stem = unused_stem()
        thinking = {"role": "assistant", "content": "a", "reasoning_content": "r"}
        chat = Conversation([{"role": "user", "content": "u"}, thinking])
        try:
            words = self._words(key_of(mark_texts(chat, stem)[0]), stem, False)
        except TemplateError:
            return ""
        return words.words[2] if len(words.marks) == 3 else ""

    def last_control(self, text: str) -> str:
        """Return the last control token in a text, or an empty string."""
        found = self._control.findall(text)
        return found[-1] if found else ""

    def common(self, one: str, other: str) -> str:
        """Return the common beginning of two texts, without splitting a control token."""
        pairs = zip(self._atoms(one), self._atoms(other), strict=False)
        return "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def _atoms(self, text: str) -> list[str]:
        """Split a text into its control tokens and its other characters."""
        atoms, at = [], 0
        for control in self._control.finditer(text):
            atoms += [*text[at : control.start()], control.group()]
            at = control.end()
        return [*atoms, *text[at:]]

    def _render_marks(self, key: str, stem: str, add_generation_prompt: bool) -> Words:
        text = self.render(chat_of_key(key), add_generation_prompt=add_generation_prompt)
        return split_at_marks(text, stem)


def end_tokens(tokenizer: Any, own: int | Sequence[int] | None = None) -> list[int]:
    """Return the ids of the tokens at which a model stops: its own, and those that end its texts.

    An answer ends at the chat template's marker, other text at the end-of-text token.

    Args:
        tokenizer: A tokenizer of transformers. None ends no text.
        own: The tokens at which the model stops already, as a `generation_config` names them.
    """
    ends = [own] if isinstance(own, int) else [*(own or ())]
    if getattr(tokenizer, "chat_template", None) is not None:
        with suppress(CostlyTemplate):  # trained weights are exported all the same
            ends += ChatTemplate(tokenizer).end_tokens()
    eos = getattr(tokenizer, "eos_token_id", None)
    return list(dict.fromkeys([*ends, *([] if eos is None else [eos])]))


def _joined(parts: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join the parts [first, last) of a text that touch or overlap."""
    joined: list[tuple[int, int]] = []
    for first, last in parts:
        if joined and joined[-1][1] >= first:
            joined[-1] = (joined[-1][0], last)
        else:
            joined.append((first, last))
    return joined


def _end_of(words: Words, message: int) -> tuple[list[tuple[int, int]], str]:
    """Return the marks of a message and of all later ones, and the last word."""
    return [mark for mark in words.marks if mark[0] >= message], words.words[-1]
