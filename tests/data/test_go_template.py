"""Chat templates in Ollama's language write what they write in transformers."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from lit_ft.compat.refusal import Refusal
from lit_ft.data.go_template import GoTemplate, go_template
from lit_ft.data.turns import ChatTemplate
from lit_ft.models.export.modelfile import modelfile
from tests.support.ollama import prompt_of, read_modelfile
from tests.support.trl_templates import NAMES, read, talk

LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') }}"
    "{{ m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def written(tokenizer: PreTrainedTokenizerFast) -> GoTemplate:
    return go_template(ChatTemplate(tokenizer))


def prompt(go: GoTemplate, chat: list[dict[str, str]], think: bool | None = None) -> str:
    return prompt_of(read_modelfile(modelfile(go, [])), chat, think)


def expected(tokenizer: PreTrainedTokenizerFast, chat: Any, **options: Any) -> str:
    if ChatTemplate(tokenizer)._reads_parts:
        chat = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in chat]
    options = {"add_generation_prompt": True} | options
    return str(tokenizer.apply_chat_template(chat, tokenize=False, **options))


def chats(*, system: bool) -> list[list[dict[str, Any]]]:
    """Return chats of one, two and three questions; the last question has no answer yet."""
    return [talk(turns, system=system)[:-1] for turns in (1, 2, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_templates_of_well_known_models_write_the_same_prompts(
    tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    tokenizer.chat_template = read(name)
    go = written(tokenizer)
    has_system = not any("takes no system message" in note for note in go.notes)
    for chat in [*chats(system=False), *(chats(system=True) if has_system else [])]:
        assert prompt(go, chat) == expected(tokenizer, chat)
        # Ollama goes on with an answer that a chat ends with.
        begun = [*chat, {"role": "assistant", "content": "BEGUN"}]
        options = {"add_generation_prompt": False, "continue_final_message": True}
        assert prompt(go, begun) == expected(tokenizer, begun, **options)


def test_the_default_system_message_stands_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    go = written(tokenizer)
    assert go.system == "You are helpful" and go.system not in go.text
    for chat in (*chats(system=True), *chats(system=False)):
        assert prompt(go, chat) == expected(tokenizer, chat)


@pytest.mark.parametrize("default", ['Say """no"""', "No\N{NO-BREAK SPACE}break"])
def test_a_default_that_a_modelfile_cannot_hold_stays_in_the_template(
    tokenizer: PreTrainedTokenizerFast, default: str
) -> None:
    tokenizer.chat_template = str(tokenizer.chat_template).replace("You are helpful", default)
    go = written(tokenizer)
    assert not go.system
    for chat in (*chats(system=True), *chats(system=False)):
        assert prompt(go, chat) == expected(tokenizer, chat)


@pytest.mark.parametrize("word", ["{", "{{", '"""\n', '\\"', "}}", "\u00a0\u2028", "a\tb", "｜▁"])
def test_words_that_mean_something_to_go_or_to_ollama_are_quoted(
    tokenizer: PreTrainedTokenizerFast, word: str
) -> None:
    template = "{% for m in messages %}{{ m.role[0] + w + m.content + w }}{% endfor %}"
    template = "{% set w = " + repr(word) + " %}" + template
    tokenizer.chat_template = template + "{% if add_generation_prompt %}{{ 'a' + w }}{% endif %}"
    go = written(tokenizer)
    for chat in (*chats(system=True), *chats(system=False)):
        assert prompt(go, chat) == expected(tokenizer, chat)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_what_the_tokenizer_adds_is_not_written_twice(
    tokenizer: PreTrainedTokenizerFast, adds_bos: bool
) -> None:
    """Llama 2's template: each question begins with it, and the first holds the system message."""
    tokenizer.bos_token = "<|endoftext|>"
    if adds_bos:
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    tokenizer.chat_template = LLAMA_2
    go = written(tokenizer)
    for chat in (*chats(system=True), *chats(system=False)):
        own = expected(tokenizer, chat)
        assert own.startswith("<|endoftext|>[INST]")
        ids = tokenizer(prompt(go, chat))["input_ids"]
        assert ids == tokenizer(own, add_special_tokens=False)["input_ids"]
    assert not go.notes
    tokenizer.chat_template = LLAMA_2.replace("bos_token + ", "")
    assert any("begins each chat with <|endoftext|>" in n for n in written(tokenizer).notes) is (
        adds_bos
    )


def test_a_template_that_depends_on_more_than_roles_is_refused(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    numbered = "{% for m in messages %}{{ loop.index }}{{ m.role + m.content }}{% endfor %}"
    tokenizer.chat_template = numbered
    with pytest.raises(Refusal, match="other words around the same message at other places"):
        written(tokenizer)
    tokenizer.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(Refusal, match="the messages of a chat in another order"):
        written(tokenizer)
    tokenizer.chat_template = "{{ raise_exception('one turn only') }}"
    with pytest.raises(Refusal, match="cannot render a chat of 1 turns: one turn only"):
        written(tokenizer)


def test_a_date_stays_that_of_the_file(tokenizer: PreTrainedTokenizerFast) -> None:
    own = str(tokenizer.chat_template)
    assert not written(tokenizer).notes
    tokenizer.chat_template = own.replace(
        "{% for", "{{ 'Today is ' + strftime_now('%d %b %Y') }}{% for", 1
    )
    (note,) = written(tokenizer).notes
    assert "writes the day's date" in note


@pytest.mark.slow
def test_thoughts_are_written_where_the_template_writes_them(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = read("qwen3")
    go = written(tokenizer)
    chat = talk(3, system=True, reasoning=True)
    begun = {"add_generation_prompt": False, "continue_final_message": True}
    assert prompt(go, chat[:-1]) == expected(tokenizer, chat[:-1])
    assert "THOUGHT" not in prompt(go, chat[:-1])
    assert prompt(go, chat) == expected(tokenizer, chat, **begun)
    assert "THOUGHT2" in prompt(go, chat)
    asked = chat[:-1]
    for think in (True, False):
        assert prompt(go, asked, think) == expected(tokenizer, asked, enable_thinking=think)
    # Ollama cuts thoughts out of answers by the tags that stand around them in the template.
    assert "<think>\n{{ .Thinking }}\n</think>\n\n{{" in go.text


@pytest.mark.slow
@pytest.mark.parametrize(("name", "told"), [("deepseekv3", True), ("qwen3", False)])
def test_thoughts_that_ollama_keeps_are_told(
    tokenizer: PreTrainedTokenizerFast, name: str, told: bool
) -> None:
    """DeepSeek's template leaves thoughts out of earlier answers, and writes none anywhere."""
    tokenizer.chat_template = read(name)
    assert any("keeps thoughts" in note for note in written(tokenizer).notes) is told
