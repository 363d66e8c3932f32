from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lit_ft.data.encoded import EncodedRow, EncodingReport
from lit_ft.data.encoding import Encoder, load_chat_template
from lit_ft.data.rows import ParsedRow
from tests.support.tokenizer import CHATML

END = "<|im_end|>"
CHAT = [
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": " a1\n"},
    {"role": "user", "content": "q2"},
    {"role": "assistant", "content": "a2"},
]

texts = st.text(st.characters(codec="utf-8", exclude_characters="<>|"), max_size=12)
chats = st.lists(st.tuples(texts, texts), min_size=1, max_size=3).map(
    lambda turns: [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
)
with_tokenizer = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def marked(template: str) -> str:
    """Give ChatML's template marks around what the assistant says."""
    turn = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    assert turn in template
    return template.replace(
        turn,
        "{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
        "{% else %}" + turn + "{% endif %}",
    )


def encode(
    tokenizer: PreTrainedTokenizerFast, conversation: Any, max_length: int = 10_000, **options: Any
) -> EncodedRow:
    encoder = Encoder(tokenizer, max_length, **options)
    (row,) = encoder([ParsedRow("my.jsonl:57", conversation)])
    return row


def learnt(tokenizer: PreTrainedTokenizerFast, row: EncodedRow) -> str:
    """Decode the tokens whose place in `labels` is not -100: what the loss sees."""
    places = [place for place, label in enumerate(row.labels) if label != -100]
    return str(tokenizer.decode([row.input_ids[place] for place in places]))


@pytest.mark.parametrize("marks", [False, True])
@with_tokenizer
@given(chat=chats)
def test_exactly_the_answers_and_their_ends_are_learnt(
    tokenizer: PreTrainedTokenizerFast, marks: bool, chat: list[dict[str, str]]
) -> None:
    tokenizer.chat_template = marked(CHATML) if marks else CHATML
    row = encode(tokenizer, chat)
    answers = [turn["content"] + END for turn in chat if turn["role"] == "assistant"]
    assert learnt(tokenizer, row) == "".join(answers)
    assert all(
        label in (-100, token) for label, token in zip(row.labels, row.input_ids, strict=True)
    )
    assert tokenizer.decode(row.input_ids) == tokenizer.apply_chat_template(chat, tokenize=False)
    assert row.labels[0] == -100
    assert row.num_targets == sum(label != -100 for label in row.labels)


@with_tokenizer
@given(chat=chats)
def test_both_ways_to_find_the_answers_agree(
    tokenizer: PreTrainedTokenizerFast, chat: list[dict[str, str]]
) -> None:
    tokenizer.chat_template = CHATML
    by_prefix = encode(tokenizer, chat)
    tokenizer.chat_template = marked(CHATML)
    assert encode(tokenizer, chat) == by_prefix


def test_no_token_reaches_from_the_prompt_into_the_answer(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    plain = (
        "{% for message in messages %}{{ message['role'] + ':' + message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    tokenizer.add_tokens([":x"])
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "xy"}]
    tokenizer.chat_template = plain
    by_prefix = encode(tokenizer, chat)
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] + ':' }}{% generation %}"
        "{% if message['role'] == 'assistant' %}{{ message['content'] }}{% endif %}"
        "{% endgeneration %}"
        "{% if message['role'] != 'assistant' %}{{ message['content'] }}{% endif %}{% endfor %}"
    )
    assert encode(tokenizer, chat) == by_prefix
    # The prompt "assistant:" has no token ":x", so the model is not trained on one there.
    assert learnt(tokenizer, by_prefix) == f"xy{END}"
    assert [note for note in by_prefix.notes if "share a token" in note]


def test_the_shipped_template_serves_a_tokenizer_without_one(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r'my.jsonl:57: .*no chat template.*chat_template="plain"'):
        encode(tokenizer, CHAT)
    tokenizer.chat_template = load_chat_template("plain")
    row = encode(tokenizer, CHAT)
    assert tokenizer.decode(row.input_ids) == (
        f"<|im_start|>User: q1\nAssistant:  a1\n{END}\nUser: q2\nAssistant: a2{END}\n"
    )
    assert learnt(tokenizer, row) == f"  a1\n{END} a2{END}"
    prompt = tokenizer.apply_chat_template(
        json.loads(row.prompt), tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(row.input_ids).startswith(prompt)


def test_a_template_file_is_read_and_a_missing_one_refused(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{{ 'ü' }}\n", encoding="utf-8")
    assert load_chat_template(str(tmp_path / "own.jinja")) == "{{ 'ü' }}\n"
    with pytest.raises(ValueError, match="chat_template=plane: neither `plain` nor a text file"):
        load_chat_template("plane")


def test_without_an_end_token_the_newline_ends_the_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] + ':\n' + message['content'] + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
    )
    row = encode(tokenizer, CHAT)
    assert learnt(tokenizer, row) == f" a1\n\na2\n{END}"
    assert [note for note in row.notes if "end-of-text token is added" in note]


def test_a_template_may_render_earlier_turns_otherwise(tokenizer: PreTrainedTokenizerFast) -> None:
    # As reasoning models do: only the last answer keeps its thoughts.
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' }}"
        "{% if loop.last %}<think></think>{% endif %}{{ message['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    assert learnt(tokenizer, encode(tokenizer, CHAT)) == f" a1\n{END}a2{END}"
    row = encode(tokenizer, CHAT, learn_empty_think=True)
    assert learnt(tokenizer, row) == f" a1\n{END}<think></think>a2{END}"


@pytest.mark.parametrize("marks", [False, True])
def test_a_chat_may_begin_with_the_assistant(
    tokenizer: PreTrainedTokenizerFast, marks: bool
) -> None:
    tokenizer.chat_template = marked(CHATML) if marks else CHATML
    assert learnt(tokenizer, encode(tokenizer, CHAT[1:])) == f" a1\n{END}a2{END}"


def test_what_the_template_refuses_is_named_by_row(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="my.jsonl:57: roles must alternate"):
        encode(tokenizer, CHAT)


def test_of_plain_text_everything_is_learnt(tokenizer: PreTrainedTokenizerFast) -> None:
    row = encode(tokenizer, "the user asks")
    assert tokenizer.decode(row.input_ids) == f"the user asks{END}"
    assert row.labels == [-100, *row.input_ids[1:]]
    assert encode(tokenizer, f"the user asks{END}").input_ids == row.input_ids
    assert row.prompt == ""


def test_plain_text_begins_as_the_tokenizer_wants(tokenizer: PreTrainedTokenizerFast) -> None:
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    ids = encode(tokenizer, "asks").input_ids
    assert (ids[0], ids[-1]) == (bos, tokenizer.eos_token_id)
    # The chat template writes it already.
    assert encode(tokenizer, CHAT).input_ids.count(bos) == len(CHAT) + 1
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        encode(tokenizer, "asks")


def test_the_prompt_is_what_comes_before_the_last_answer(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    longer = [*CHAT, {"role": "user", "content": "q3"}]
    assert json.loads(encode(tokenizer, CHAT).prompt) == CHAT[:3]
    assert json.loads(encode(tokenizer, longer).prompt) == CHAT[:3]


@given(max_length=st.integers(2, 40))
@with_tokenizer
def test_cutting_takes_tokens_from_the_end(
    tokenizer: PreTrainedTokenizerFast, max_length: int
) -> None:
    whole = encode(tokenizer, CHAT)
    cut = encode(tokenizer, CHAT, max_length)
    assert cut.input_ids == whole.input_ids[:max_length]
    assert cut.labels == whole.labels[:max_length]
    assert cut.truncated == (whole.num_tokens > max_length)
    dropped = encode(tokenizer, CHAT, max_length, overlong="drop")
    assert dropped.overlong == cut.truncated
    assert not dropped.truncated
    assert dropped.input_ids == ([] if dropped.overlong else whole.input_ids)


def test_every_row_is_counted_once(tokenizer: PreTrainedTokenizerFast) -> None:
    short = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    long_answer = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a" * 300}]
    long_prompt = [{"role": "user", "content": "q" * 300}, {"role": "assistant", "content": "a"}]
    conversations = [short, short, long_answer, long_prompt, short[:1], "x" * 100_000]

    def report(**options: Any) -> EncodingReport:
        encoder = Encoder(tokenizer, 200, **options)
        rows = list(encoder(ParsedRow("f:1", one) for one in conversations))
        names = ("num_tokens", "num_targets", "truncated", "overlong")
        return EncodingReport.of(**{n: np.array([getattr(r, n) for r in rows]) for n in names})

    tokens = encode(tokenizer, short).num_tokens
    before = encode(tokenizer, long_answer).labels.index(tokenizer("a").input_ids[0])
    assert report() == EncodingReport(
        examples=4,
        truncated=2,
        dropped_without_targets=2,
        tokens=2 * tokens + 2 * 200,
        targets=2 * 2 + (200 - before) + 199,
    )
    assert report(overlong="drop") == EncodingReport(
        examples=2, dropped_overlong=3, dropped_without_targets=1, tokens=2 * tokens, targets=4
    )
    total = report() + report(overlong="drop")
    assert (total.examples, total.dropped_overlong, total.dropped_without_targets) == (6, 3, 3)
    assert "6 examples" in str(total)
    assert "3 dropped as too long; 3 dropped for lack of a target" in str(total)


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow is not a fast tokenizer"):
        Encoder(Slow(), 10)  # type: ignore[arg-type]
