"""The chat templates of well-known models, as the package `trl` ships them."""

from __future__ import annotations

from typing import Any

import pytest
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from lit_ft.compat.refusal import Refusal
from lit_ft.data.conversation import Conversation
from lit_ft.data.encoded import EncodedRow
from lit_ft.data.encoding import Encoder
from lit_ft.data.masks import ChatEncoder
from lit_ft.data.rows import ParsedRow
from lit_ft.data.turns import ChatTemplate, end_tokens
from tests.support.trl_templates import NAMES, read, talk

pytestmark = pytest.mark.slow

# These refuse a message of the role system.
NO_SYSTEM = {"gemma", "gemma_training"}
# GLM-4-MoE ends no answer: the next turn's first token does. The end-of-text token is learnt.
NO_END = {"glm4moe"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tell the weather.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "The city."}},
                "required": ["city"],
            },
        },
    }
]


CALL = {"id": "call00001", "type": "function"}
CALLS = [
    {"role": "user", "content": "QUESTION"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [CALL | {"function": {"name": "weather", "arguments": {"city": "ROME"}}}],
    },
    {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": "SUNNY"},
    {"role": "assistant", "content": "ANSWER"},
]


def encode(tokenizer: PreTrainedTokenizerFast, chat: Any, tools: Any = None) -> EncodedRow:
    (row,) = Encoder(tokenizer, 100_000)([ParsedRow("my.jsonl:57", Conversation(chat, tools))])
    return row


def answers(tokenizer: PreTrainedTokenizerFast, row: EncodedRow) -> list[str]:
    """Return the runs of learnt tokens, decoded."""
    runs: list[list[int]] = [[]]
    for label in row.labels:
        if label != -100:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [str(tokenizer.decode(run)) for run in runs if run]


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_each_answer_is_learnt_whole_with_its_end_and_nothing_else(
    tokenizer: PreTrainedTokenizerFast, name: str, turns: int, system: bool
) -> None:
    tokenizer.chat_template = read(name)
    chat = talk(turns, system=system)
    if system and name in NO_SYSTEM:
        with pytest.raises(ValueError, match="System role not supported"):
            encode(tokenizer, chat)
        return
    row = encode(tokenizer, chat)
    learnt = answers(tokenizer, row)
    assert len(learnt) == turns
    template = ChatTemplate(tokenizer)
    for i, answer in enumerate(learnt):
        before, text, end = answer.partition(f"ANSWER{i}")
        assert text
        # Only what names the channel is the model's own: it must write that itself.
        assert before.strip() in ("", "to=user<|message|>", "<|channel|>final<|message|>")
        is_last = i == turns - 1
        if name in NO_END:
            assert end == (tokenizer.eos_token if is_last else "")
        else:
            assert template.last_control(end) and end.endswith(template.last_control(end))
    said = "".join(learnt)
    assert not any(word in said for word in ("QUESTION", "SYSTEM", "think>", "THOUGHT"))
    # All of the row is the true rendering.
    text = template.render(Conversation(chat))
    added = tokenizer.eos_token if name in NO_END else ""
    assert str(tokenizer.decode(row.input_ids)) == text + added


def renders(tokenizer: PreTrainedTokenizerFast, word: str, chat: Any, tools: Any) -> bool:
    """Whether the template renders a word of a chat at all."""
    try:
        return word in ChatTemplate(tokenizer).render(Conversation(chat, tools))
    except TemplateError:
        return False


@pytest.mark.parametrize("name", NAMES)
def test_reasoning_is_learnt_or_refused_by_name(
    tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    tokenizer.chat_template = read(name)
    chat = talk(2, system=False, reasoning=True)
    template = ChatTemplate(tokenizer)
    if "THOUGHT1" not in template.render(Conversation(chat)):
        with pytest.raises(Refusal, match="leaves out the reasoning of message 3"):
            encode(tokenizer, chat)
        return
    row = encode(tokenizer, chat)
    said = answers(tokenizer, row)
    assert "THOUGHT1" in said[-1] and "ANSWER1" in said[-1]
    # What the template leaves out of earlier answers is told.
    is_told = any("the reasoning of earlier answers" in note for note in row.notes)
    assert is_told != ("THOUGHT0" in said[0])
    assert "QUESTION" not in "".join(said)


@pytest.mark.parametrize("name", NAMES)
def test_calls_of_tools_are_learnt_or_refused_by_name(
    tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    tokenizer.chat_template = read(name)
    if not renders(tokenizer, "ROME", CALLS, TOOLS):
        with pytest.raises(ValueError, match="^my.jsonl:57: "):
            encode(tokenizer, CALLS, TOOLS)
        return
    try:
        row = encode(tokenizer, CALLS, TOOLS)
    except Refusal as refusal:
        assert "leaves out the tools" in str(refusal)
        assert not renders(tokenizer, "Tell the weather.", CALLS, TOOLS)
        return
    said = answers(tokenizer, row)
    calls, answer = said[0], said[-1]
    assert "weather" in calls and "ROME" in calls and "ANSWER" in answer
    assert not any(word in "".join(said) for word in ("QUESTION", "SUNNY", "Tell the"))


def test_a_marker_that_ends_thoughts_too_ends_no_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    """A model that stopped at gpt-oss' <|end|> would think, and never answer."""
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|end|>", "<|return|>"]})
    tokenizer.chat_template = read("gptoss")
    ends = [tokenizer.convert_tokens_to_ids("<|return|>"), tokenizer.eos_token_id]
    assert end_tokens(tokenizer) == ends


def test_a_template_is_rendered_about_once_a_row(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = read("qwen3")
    encoder = ChatEncoder(ChatTemplate(tokenizer))
    for i in range(100):
        encoder(
            Conversation(
                [{"role": "user", "content": str(i)}, {"role": "assistant", "content": "a"}]
            )
        )
    assert encoder.template._structure.cache_info().misses == 1
