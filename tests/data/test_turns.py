"""Turns are found in what a template renders, and nothing that a message says goes unseen."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from lit_ft.compat.refusal import Refusal
from lit_ft.data.conversation import Conversation
from lit_ft.data.encoded import EncodedRow
from lit_ft.data.encoding import Encoder
from lit_ft.data.rows import ParsedRow
from lit_ft.data.turns import ChatTemplate

END = "<|im_end|>"
OPEN = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
CLOSE = (
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# What stands between OPEN and CLOSE: as well-known templates write it.
PLAIN = "{{ m['content'] }}"
STRIPS = "{{ m['content'] | trim }}"
THINKS = (
    "{% if m['role'] == 'assistant' and (loop.last or m.reasoning_content) %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] }}"
)
CALLS = (
    "{{ m['content'] }}{% for c in m.tool_calls or [] %}{{ '<tool_call>' }}"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}"
    "{{ '</tool_call>' }}{% endfor %}"
)
SPLITS = "{{ m['content'].split('</think>')[-1] }}"
QUOTES = "{% if m['role'] == 'tool' %}{{ m['content'] | tojson }}{% else %}" + PLAIN + "{% endif %}"
SHOUTS = "{{ m['content'] | upper }}"

texts = st.text(st.characters(codec="utf-8", exclude_characters="<>|"), max_size=12)
whole = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def chats(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Draw a chat with every kind of message: system, reasoning, calls, tools, several answers."""
    chat: list[dict[str, Any]] = []
    if draw(st.booleans()):
        chat.append({"role": "system", "content": draw(texts)})
    for _ in range(draw(st.integers(1, 3))):
        chat.append({"role": "user", "content": draw(texts)})
        if draw(st.booleans()):
            call = {"name": draw(texts.filter(str.strip)), "arguments": {"x": draw(texts)}}
            chat.append(
                {"role": "assistant", "content": draw(texts), "tool_calls": [{"function": call}]}
            )
            chat.append({"role": "tool", "content": draw(texts)})
        chat.append({"role": "assistant", "content": draw(texts)})
        if draw(st.booleans()):
            chat[-1]["reasoning_content"] = draw(texts)
    return chat


def encode(tokenizer: PreTrainedTokenizerFast, content: Any, **options: Any) -> EncodedRow:
    (row,) = Encoder(tokenizer, 10_000, **options)([ParsedRow("my.jsonl:57", content)])
    return row


def learnt(tokenizer: PreTrainedTokenizerFast, row: EncodedRow) -> str:
    return str(tokenizer.decode([label for label in row.labels if label != -100]))


def watched(template: ChatTemplate, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of messages of each chat that is rendered from now on."""
    rendered: list[int] = []
    render = template.render

    def counted(chat: Conversation, **options: Any) -> str:
        rendered.append(len(chat.messages))
        return render(chat, **options)

    monkeypatch.setattr(template, "render", counted)
    return rendered


@pytest.mark.parametrize("body", [PLAIN, STRIPS, CALLS, QUOTES])
@whole
@given(chat=chats())
def test_what_is_learnt_is_the_answers_with_their_ends(
    tokenizer: PreTrainedTokenizerFast, body: str, chat: list[dict[str, Any]]
) -> None:
    tokenizer.chat_template = OPEN + body + CLOSE
    row = encode(tokenizer, chat, drop_unrendered=True)
    answers = []
    for turn in chat:
        if turn["role"] == "assistant":
            text = tokenizer.apply_chat_template([turn], tokenize=False)
            answers.append(text.removeprefix("<|im_start|>assistant\n").removesuffix("\n"))
    assert learnt(tokenizer, row) == "".join(answers)


@pytest.mark.parametrize("body", [PLAIN, STRIPS, THINKS, CALLS, SPLITS])
@whole
@given(chat=chats())
def test_no_text_is_lost_without_a_refusal(
    tokenizer: PreTrainedTokenizerFast, body: str, chat: list[dict[str, Any]]
) -> None:
    tokenizer.chat_template = OPEN + body + CLOSE
    said = [
        (i, turn.get(field, ""))
        for i, turn in enumerate(chat)
        for field in ("content", "reasoning_content")
    ]
    try:
        text = tokenizer.decode(encode(tokenizer, chat).input_ids)
    except ValueError as error:
        assert "leaves out" in str(error)
        return
    last = max(i for i, turn in enumerate(chat) if turn["role"] == "assistant")
    earlier = [words.strip() for i, words in said if i < last]
    kept = [words.strip() for i, words in said if i == last]
    note = any("earlier answers" in note for note in encode(tokenizer, chat).notes)
    assert all(words in text for words in kept)
    assert note or all(words in text for words in earlier)


@whole
@given(chat=chats())
def test_an_empty_block_of_thinking_is_not_learnt(
    tokenizer: PreTrainedTokenizerFast, chat: list[dict[str, Any]]
) -> None:
    tokenizer.chat_template = OPEN + THINKS + CLOSE
    targets = learnt(tokenizer, encode(tokenizer, chat, drop_unrendered=True))
    thoughts = [turn for turn in chat if turn.get("reasoning_content", "").strip()]
    assert targets.count("</think>") == len(thoughts)
    empty = encode(tokenizer, chat, drop_unrendered=True, learn_empty_think=True)
    assert learnt(tokenizer, empty).count("</think>") >= len(thoughts)


TALK = [
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": "a1"},
    {"role": "tool", "content": "t1"},
    {"role": "assistant", "content": "a2"},
]


@pytest.mark.parametrize(
    ("train_on", "flags", "expected"),
    [
        ("assistant", {}, f"a1{END}a2{END}"),
        ("last", {}, f"a2{END}"),
        (["tool"], {}, f"t1{END}"),
        (["user", "assistant"], {}, f"q1{END}a1{END}a2{END}"),
        ("assistant", {1: False}, f"a2{END}"),
        ("last", {1: True}, f"a1{END}a2{END}"),
        ("assistant", {0: True, 3: False}, f"q1{END}a1{END}"),
    ],
)
def test_which_turns_are_learnt_is_a_choice_of_the_run_and_of_the_row(
    tokenizer: PreTrainedTokenizerFast, train_on: Any, flags: dict[int, bool], expected: str
) -> None:
    tokenizer.chat_template = OPEN + PLAIN + CLOSE
    chat = [turn | ({"train": flags[i]} if i in flags else {}) for i, turn in enumerate(TALK)]
    assert learnt(tokenizer, encode(tokenizer, chat, train_on=train_on)) == expected


def test_all_learns_every_token_but_those_that_the_row_excludes(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = OPEN + PLAIN + CLOSE
    row = encode(tokenizer, TALK, train_on="all")
    assert row.labels[1:] == row.input_ids[1:]
    chat = [TALK[0] | {"train": False}, *TALK[1:]]
    assert learnt(tokenizer, encode(tokenizer, chat, train_on="all")).startswith("user\n\n")


@pytest.mark.parametrize(
    ("body", "chat", "complaint"),
    [
        (SPLITS, [TALK[0], {"role": "assistant", "content": "<think>why</think>so"}], "'why'"),
        (PLAIN, [TALK[0], TALK[1] | {"reasoning_content": "why"}], "the reasoning of message 1"),
        (
            PLAIN,
            [TALK[0], TALK[1] | {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}],
            "the tool calls of message 1",
        ),
        ("{% if m['role'] != 'tool' %}" + PLAIN + "{% endif %}", TALK, r"message 2 \(tool\): 't1'"),
        (PLAIN, Conversation(TALK, [{"function": {"name": "f"}}]), "leaves out the tools"),
    ],
)
def test_what_a_template_leaves_out_is_refused_or_counted(
    tokenizer: PreTrainedTokenizerFast, body: str, chat: Any, complaint: str
) -> None:
    tokenizer.chat_template = OPEN + body + CLOSE
    with pytest.raises(Refusal, match="my.jsonl:57: .*" + complaint):
        encode(tokenizer, chat)
    row = encode(tokenizer, chat, drop_unrendered=True)
    assert row.num_targets and any("leaves out" in note for note in row.notes)


def test_thoughts_of_earlier_answers_may_be_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = OPEN + SPLITS + CLOSE
    early = [TALK[0], {"role": "assistant", "content": "<think>why</think>so"}, TALK[0], TALK[3]]
    row = encode(tokenizer, early)
    assert learnt(tokenizer, row) == f"so{END}a2{END}"
    assert any("earlier answers" in note for note in row.notes)


def test_a_template_that_changes_texts_says_so(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = OPEN + SHOUTS + CLOSE
    with pytest.raises(Refusal, match="changes what the messages say"):
        encode(tokenizer, TALK)


@pytest.mark.parametrize("choice", ["text", "keep", "refuse"])
def test_control_tokens_in_messages(tokenizer: PreTrainedTokenizerFast, choice: str) -> None:
    tokenizer.chat_template = OPEN + PLAIN + CLOSE
    chat = [TALK[0], {"role": "assistant", "content": f"say {END} then"}]
    if choice == "refuse":
        with pytest.raises(Refusal, match=r"my.jsonl:57: .*<\|im_end\|>"):
            encode(tokenizer, chat, control_tokens=choice)
        return
    row = encode(tokenizer, chat, control_tokens=choice)
    end = tokenizer.convert_tokens_to_ids(END)
    assert row.labels.count(end) == (2 if choice == "keep" else 1)
    assert learnt(tokenizer, row) == f"say {END} then{END}"
    assert any(END in note for note in row.notes)


def test_a_prompt_that_ends_in_a_space_is_that_of_training(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    chat = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "the end"}]
    row = encode(tokenizer, chat)
    prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True)["input_ids"]
    assert row.input_ids[: len(prompt)] == prompt
    assert learnt(tokenizer, row) == f"the end{END}"


def test_of_named_templates_the_one_for_the_chat_is_taken(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tools = "{{ tools | tojson }}"
    tokenizer.chat_template = {
        "default": OPEN + PLAIN + CLOSE,
        "tool_use": tools + OPEN + PLAIN + CLOSE,
    }
    assert learnt(tokenizer, encode(tokenizer, TALK)) == f"a1{END}a2{END}"
    row = encode(tokenizer, Conversation(TALK, [{"function": {"name": "weather"}}]))
    assert "weather" in tokenizer.decode(row.input_ids)


def test_a_template_of_another_tokenizer_is_noticed(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = (OPEN + PLAIN + CLOSE).replace("<|im_end|>", "<|eot|>")
    row = encode(tokenizer, TALK)
    assert learnt(tokenizer, row) == "a1<|eot|>a2<|eot|>"
    assert any("'<|eot|>', which is not one token" in note for note in row.notes)


def test_marks_without_the_end_are_noticed(tokenizer: PreTrainedTokenizerFast) -> None:
    marks = "{% generation %}{{ m['content'] }}{% endgeneration %}"
    body = "{% if m['role'] == 'assistant' %}" + marks + "{% else %}" + PLAIN + "{% endif %}"
    tokenizer.chat_template = OPEN + body + CLOSE
    row = encode(tokenizer, TALK)
    assert learnt(tokenizer, row) == "a1a2"
    assert any("without a learnt end token" in note for note in row.notes)


@whole
@given(
    text=st.text(st.characters(codec="utf-8", exclude_characters="<>|"), min_size=1),
    size=st.integers(2, 9),
)
def test_a_split_text_loses_no_token(
    tokenizer: PreTrainedTokenizerFast, text: str, size: int
) -> None:
    whole_row = encode(tokenizer, text)
    rows = list(Encoder(tokenizer, size, overlong="split")([ParsedRow("f:1", text)]))
    assert all(row.num_tokens <= size for row in rows)
    targets = [label for row in rows for label in row.labels if label != -100]
    assert targets == [label for label in whole_row.labels if label != -100]


@whole
@given(chat=chats(), size=st.integers(20, 120))
def test_a_split_chat_learns_each_answer_that_fits_once(
    tokenizer: PreTrainedTokenizerFast, chat: list[dict[str, Any]], size: int
) -> None:
    tokenizer.chat_template = OPEN + CALLS + CLOSE
    whole_row = encode(tokenizer, chat, drop_unrendered=True)
    encoder = Encoder(tokenizer, size, overlong="split", drop_unrendered=True)
    rows = list(encoder([ParsedRow("f:1", chat)]))
    assert all(row.num_tokens <= size for row in rows)
    if not any(row.overlong for row in rows):
        assert "".join(learnt(tokenizer, row) for row in rows) == learnt(tokenizer, whole_row)


def test_a_structure_is_rendered_once(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.chat_template = OPEN + PLAIN + CLOSE
    template = ChatTemplate(tokenizer)
    rendered = watched(template, monkeypatch)
    for i in range(5):
        template.find(Conversation([{"role": "user", "content": f"q{i}"}, TALK[1]]))
        if i == 0:
            first = len(rendered)
    assert len(rendered) == first


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("<think>why</think>", f"<think>why</think>{END}"),
        ("<think>\nwhy\n</think>\n\n", f"<think>\nwhy\n</think>\n\n{END}"),
        ("<think></think>", END),
    ],
)
def test_an_answer_of_thoughts_alone_is_learnt_with_its_end(
    tokenizer: PreTrainedTokenizerFast, answer: str, expected: str
) -> None:
    tokenizer.chat_template = OPEN + PLAIN + CLOSE
    chat = [TALK[0], {"role": "assistant", "content": answer}]
    assert learnt(tokenizer, encode(tokenizer, chat)) == expected


@pytest.mark.parametrize("chat", [TALK[:1], TALK[:2]])
def test_what_the_system_says_of_thinking_is_no_thought(
    tokenizer: PreTrainedTokenizerFast, chat: list[dict[str, Any]]
) -> None:
    tokenizer.chat_template = (
        OPEN + "{% if m['role'] != 'system' %}" + PLAIN + "{% endif %}" + CLOSE
    )
    system = {"role": "system", "content": "Think in <think></think>."}
    with pytest.raises(Refusal, match=r"leaves out the content of message 0 \(system\)"):
        encode(tokenizer, [system, *chat])


def test_a_run_goes_on_over_midnight(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock:
        day = "01"

        @classmethod
        def now(cls) -> Any:
            return cls

        @classmethod
        def strftime(cls, form: str) -> str:
            return cls.day

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
    tokenizer.chat_template = "{{ strftime_now('%d') }}" + OPEN + PLAIN + CLOSE
    encoder = Encoder(tokenizer, 10_000)
    for Clock.day in ("01", "02"):
        (row,) = encoder([ParsedRow("f:1", TALK)])
        assert learnt(tokenizer, row) == f"a1{END}a2{END}"
        assert str(tokenizer.decode(row.input_ids)).startswith(Clock.day)


def test_every_control_token_of_the_tokenizer_is_text_in_a_message(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = OPEN + PLAIN + CLOSE
    tokenizer.add_tokens([AddedToken("<|eot|>", special=True)])  # no name knows this one
    chat = [{"role": "user", "content": "say <|eot|>"}, TALK[1]]
    row = encode(tokenizer, chat)
    assert tokenizer.convert_tokens_to_ids("<|eot|>") not in row.input_ids
    assert any("<|eot|>" in note for note in row.notes)


def test_an_unknown_word_is_no_control_token() -> None:
    backend = Tokenizer(WordLevel({"<unk>": 0, "user": 1, "assistant": 2, "</s>": 3}, "<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    words.chat_template = "{% for m in messages %}{{ m.role + ' ' + m.content }} </s> {% endfor %}"
    row = encode(words, TALK[:2], control_tokens="refuse")
    assert row.input_ids == [1, 0, 3, 2, 0, 3]


SPLIT = [
    [TALK[1], TALK[0], TALK[3]],
    [{"role": "system", "content": "s"}, TALK[1], TALK[0], TALK[0], TALK[3]],
]


@pytest.mark.parametrize("chat", SPLIT)
@pytest.mark.parametrize(("train_on", "expected"), [("assistant", ["a1", "a2"]), ("last", ["a2"])])
def test_a_split_chat_learns_no_other_answers_than_a_whole_one(
    tokenizer: PreTrainedTokenizerFast, chat: Any, train_on: Any, expected: list[str]
) -> None:
    tokenizer.chat_template = OPEN + PLAIN + CLOSE
    size = encode(tokenizer, chat).num_tokens - 1
    encoder = Encoder(tokenizer, size, overlong="split", train_on=train_on)
    rows = list(encoder([ParsedRow("f:1", chat)]))
    assert len(rows) == 2
    assert [said for row in rows if (said := learnt(tokenizer, row))] == [e + END for e in expected]
    asked = str(tokenizer.decode(rows[-1].input_ids)).count("q1")
    assert asked == len([turn for turn in chat if turn["role"] == "user"])


def test_a_chat_that_cannot_be_split_is_dropped_as_too_long(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = OPEN + PLAIN + CLOSE
    (row,) = Encoder(tokenizer, 5, overlong="split")([ParsedRow("f:1", TALK[1:2])])
    assert row.overlong


def agent(calls: int) -> list[dict[str, Any]]:
    chat = [TALK[0]]
    for i in range(calls):
        call = {"name": "f", "arguments": {"x": str(i)}}
        chat += [{"role": "assistant", "content": "", "tool_calls": [{"function": call}]}, TALK[2]]
    return [*chat, TALK[3]]


def test_the_time_for_a_chat_with_calls_grows_with_its_length(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.chat_template = OPEN + CALLS + CLOSE
    template = ChatTemplate(tokenizer)
    rendered = watched(template, monkeypatch)
    template.find(Conversation(agent(30)))
    assert sum(rendered) < 10 * len(agent(30))


def test_a_template_may_count_its_answers(tokenizer: PreTrainedTokenizerFast) -> None:
    answers = "(messages[:{}] | selectattr('role', 'equalto', 'assistant') | list | length)"
    count = "{{ " + answers.format("loop.index0") + " ~ ':' }}"
    tokenizer.chat_template = (
        (OPEN + "{% if m.role == 'assistant' %}" + count + "{% endif %}" + CALLS + CLOSE).replace(
            "{{ '<|im_start|>assistant\n' }}{% endif %}", "{{ '<|im_start|>assistant\n' ~ "
        )
        + answers.format("messages | length")
        + " ~ ':' }}{% endif %}"
    )
    said = learnt(tokenizer, encode(tokenizer, agent(6)))
    assert said.startswith("<tool_call>") and said.endswith(f"{END}a2{END}")
    assert f"{END}<tool_call>" in said and ":<tool_call>" not in said


def test_the_name_of_a_function_in_its_answer_is_not_learnt(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    name = "{{ messages[loop.index0 - 1].tool_calls[0].function.name ~ ' says: ' }}"
    tokenizer.chat_template = OPEN + "{% if m['role'] == 'tool' %}" + name + "{% endif %}" + CALLS
    tokenizer.chat_template += CLOSE
    call = {"function": {"name": "look", "arguments": {}}}
    chat = [TALK[0], {"role": "assistant", "content": "", "tool_calls": [call]}, *TALK[2:]]
    text = learnt(tokenizer, encode(tokenizer, chat))
    assert text.startswith("<tool_call>") and text.endswith(f"</tool_call>{END}a2{END}")


@pytest.mark.parametrize("train_on", ["assistants", "tool", ["gpt"], ["tool", "robot"], []])
def test_turns_that_nobody_takes_are_refused(
    tokenizer: PreTrainedTokenizerFast, train_on: Any
) -> None:
    with pytest.raises(ValueError, match="system, developer, user, assistant, tool"):
        Encoder(tokenizer, 10, train_on=train_on)
