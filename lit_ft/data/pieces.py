"""What a chat template writes around each message, where that depends on the message's role alone.

No rule is made for single templates: short chats of marks are rendered, and the template's own
words between the marks are cut into pieces. Put together again, the pieces must give the words of
longer chats, with and without a system message. A template whose words depend on more is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from jinja2 import TemplateError

from lit_ft.compat import remedies
from lit_ft.compat.refusal import Refusal
from lit_ft.data.conversation import Conversation
from lit_ft.data.marks import mark_texts, split_at_marks, unused_stem
from lit_ft.data.turns import ChatTemplate

# A letter for each message of a chat; t and w are answers with thoughts, in a field and in tags.
_MESSAGES = {
    "s": {"role": "system", "content": "text"},
    "u": {"role": "user", "content": "text"},
    "a": {"role": "assistant", "content": "text"},
    "t": {"role": "assistant", "reasoning_content": "thought", "content": "text"},
    "w": {"role": "assistant", "content": "<think>\nthought\n</think>\n\ntext"},
}
_CHATS = ("u", "uau", "uauau")  # what is compared


class Thinking(NamedTuple):
    """What a chat template writes around the thoughts of an answer.

    Args:
        before: The words ahead of the thoughts, from the tag that opens them on.
        after: The words between the thoughts and the answer.
        only_last: Whether thoughts of earlier answers are left out.
        opening_without: What opens the next answer if the model shall not think.
    """

    before: str
    after: str
    only_last: bool
    opening_without: str


@dataclass(frozen=True)
class Pieces:
    """The words of a chat template around each message.

    Args:
        start: What opens a chat that has no system message.
        system: The words before and after the system message; None if the template takes none.
        user: The words before and after the user's message.
        answer: The words before and after an answer that another turn follows.
        unthought: What stands between the words before an answer and an answer without thoughts:
            if another turn follows, and in the last answer.
        opening: What opens the next answer.
        opens_first: Whether `start`, and `system`, already open the first user's turn.
        thinking: The words around thoughts; None if the template writes none, or if they change
            more than what stands in their place.
        knows_thoughts: Whether the template writes thoughts, or leaves them out of answers.
    """

    start: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    answer: tuple[str, str]
    unthought: tuple[str, str]
    opening: str
    opens_first: bool
    thinking: Thinking | None
    knows_thoughts: bool

    @property
    def default_system(self) -> str:
        """The message that the template writes if there is no system message; empty if none."""
        before, after = self.system or ("", "")
        is_one = self.start.startswith(before) and self.start[len(before) :].endswith(after)
        return self.start[len(before) : len(self.start) - len(after)] if is_one else ""

    def words(self, roles: str) -> list[str]:
        """Return the words around the messages of a chat, up to the answer that is to come.

        Args:
            roles: A letter for each message: s, u or a.
        """
        words, between = [], "" if roles[0] == "s" else self.start
        for i, role in enumerate(roles):
            if role == "s":
                before, after = self.system or ("", "")
            elif role == "u":
                before, after = self.user
                before = "" if self.opens_first and i < 2 else before
            else:
                before, after = self.answer[0] + self.unthought[0], self.answer[1]
            words.append(between + before)
            between = after
        return [*words, between + self.opening]


def pieces_of(template: ChatTemplate) -> Pieces:
    """Return what a chat template writes around each message.

    Raises:
        Refusal: If the words around a message depend on more than its role, or if the template
            cannot render a chat of two questions and an answer.
    """
    probe = _Probe(template)
    opened, closed = probe.words("u", prompt=True)[-1], probe.words("u")[-1]
    start, between, after, _ = probe.words("uau", prompt=True)
    _, last, ended = probe.words("ua")
    asked = template.common(template.common(between, opened), closed)
    answered = template.common(after, ended)
    asks = after.removeprefix(answered)
    start, system, opens_first = _opening(start, probe.around_system(), asks)
    if not last.startswith(asked):
        raise _refusal("the last answer of a chat")
    earlier, last = between.removeprefix(asked), last.removeprefix(asked)
    answers, thinking = _thinking(probe, asked, earlier, last)
    pieces = Pieces(
        start=start,
        system=system,
        user=(asks, asked),
        answer=(answers, answered),
        unthought=(earlier.removeprefix(answers), last.removeprefix(answers)),
        opening=opened.removeprefix(asked),
        opens_first=opens_first,
        thinking=thinking,
        knows_thoughts=probe.knows_thoughts(),
    )
    for roles in [*_CHATS, *("s" + roles for roles in _CHATS if system)]:
        if pieces.words(roles) != probe.words(roles, prompt=True):
            raise _refusal("the same message at other places of a chat")
    return pieces


class _Probe:
    """Renders chats of marks."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template

    def words(self, roles: str, *, prompt: bool = False, **options: Any) -> list[str]:
        """Return the template's words around the messages of a chat, which it must all write."""
        try:
            shown, words = self.render(roles, prompt=prompt, **options)
        except TemplateError as error:
            raise Refusal(
                f"the chat template cannot render a chat of {len(roles)} turns: {error}",
                remedies.LLAMA_CPP,
            ) from error
        if shown != list(range(len(roles) + roles.count("t"))):
            raise Refusal(
                "the chat template writes the messages of a chat in another order",
                remedies.LLAMA_CPP,
            )
        return words

    def render(
        self, roles: str, *, prompt: bool = False, **options: Any
    ) -> tuple[list[int], list[str]]:
        """Return the numbers of the texts that the template writes, and its words around them."""
        stem = unused_stem()
        chat = Conversation([_MESSAGES[role] for role in roles], None, options)
        marked, _ = mark_texts(chat, stem)
        found = split_at_marks(self.template.render(marked, add_generation_prompt=prompt), stem)
        return [number for _, number in found.marks], found.words

    def around_system(self) -> tuple[str, str] | None:
        """Return the words before and after the system message; None if it is left out."""
        try:
            shown, _ = self.render("su", prompt=True)
        except TemplateError:
            return None
        if shown == [1]:
            return None
        before, after, _ = self.words("su", prompt=True)
        return before, after

    def knows_thoughts(self) -> bool:
        """Return whether the template writes thoughts of its own, or leaves them out of answers."""
        try:
            return self.render("ut")[0] == [0, 1, 2] or self.render("uwu")[0] == [0, 2, 3]
        except TemplateError:
            return False


def _opening(
    start: str, system: tuple[str, str] | None, asks: str
) -> tuple[str, tuple[str, str] | None, bool]:
    """Take what opens a user's turn off what opens a chat, where the first turn opens so too."""
    if not all(words.endswith(asks) for words in (start, *(system or ())[1:])):
        return start, system, True
    system = None if system is None else (system[0], system[1].removesuffix(asks))
    return start.removesuffix(asks), system, False


def _thinking(probe: _Probe, asked: str, earlier: str, last: str) -> tuple[str, Thinking | None]:
    """Return what opens every answer, and the words around thoughts if the template writes them.

    Args:
        probe: Renders chats.
        asked: The words after the user's message.
        earlier: What opens an answer that another turn follows.
        last: What opens the last answer.
    """
    without = probe.template.common(earlier, last), None
    try:
        shown, words = probe.render("ut")
        shown_inside, inside = probe.render("utu", prompt=True)
        unthinking = probe.words("u", prompt=True, enable_thinking=False)[-1]
    except TemplateError:
        return without
    tag = probe.template.last_control(words[1].removeprefix(asked))
    if shown != [0, 1, 2] or not tag:
        return without
    answers, tag, rest = words[1].removeprefix(asked).rpartition(tag)
    only_last = shown_inside == [0, 2, 3]
    expected = [asked + earlier] if only_last else words[1:3]
    if inside[1 : 1 + len(expected)] != expected or not (
        earlier.startswith(answers) and last.startswith(answers)
    ):
        return without
    return answers, Thinking(tag + rest, words[2], only_last, unthinking.removeprefix(asked))


def _refusal(what: str) -> Refusal:
    return Refusal(f"the chat template writes other words around {what}", remedies.LLAMA_CPP)
