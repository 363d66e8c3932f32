from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pytest

from lit_ft.compat.refusal import Refusal, message_on_command_line
from lit_ft.data import formats
from lit_ft.data.conversation import Conversation, chat_of
from lit_ft.data.formats import available, detect
from lit_ft.data.formats.alpaca import Alpaca
from lit_ft.data.formats.chat import Chat
from lit_ft.data.formats.prompt_completion import PromptCompletion
from lit_ft.data.formats.segments import Segments
from lit_ft.data.formats.text import Text
from lit_ft.run.arguments import composed

CHAT = [
    {"role": "system", "content": " be brief\n"},
    {"role": "user", "content": "\tq "},
    {"role": "assistant", "content": "\n a "},
]
TURNS = CHAT[1:]

# A row of each kind, its format and the conversation in it: spaces and newlines are the user's.
ROWS: list[tuple[dict[str, Any], type, Any]] = [
    ({"messages": CHAT}, Chat, CHAT),
    (
        {
            "conversations": [
                {"from": "system", "value": " be brief\n"},
                {"from": "human", "value": "\tq "},
                {"from": "gpt", "value": "\n a "},
            ]
        },
        Chat,
        CHAT,
    ),
    ({"instruction": "\tq ", "output": "\n a "}, Alpaca, TURNS),
    ({"instruction": "\tq ", "input": "", "output": "\n a "}, Alpaca, TURNS),
    ({"instruction": "\tq ", "input": None, "output": "\n a ", "text": "all"}, Alpaca, TURNS),
    (
        {"instruction": "add", "input": " 1 2", "output": "3"},
        Alpaca,
        [{"role": "user", "content": "add\n\n 1 2"}, {"role": "assistant", "content": "3"}],
    ),
    ({"prompt": "\tq ", "completion": "\n a "}, PromptCompletion, TURNS),
    ({"prompt": CHAT[:2], "completion": CHAT[2:]}, PromptCompletion, CHAT),
    ({"prompt": CHAT[:2], "completion": "\n a "}, PromptCompletion, CHAT),
    ({"text": " once\n", "id": 3}, Text, " once\n"),
]


@pytest.mark.parametrize(("row", "kind", "conversation"), ROWS)
def test_detects_and_reads_every_format(
    row: dict[str, Any], kind: type, conversation: object
) -> None:
    found = detect(row)
    assert type(found) is kind
    content = found.parse(row)
    chat = chat_of(content)
    assert (content if chat is None else without_flags(chat)) == conversation


def without_flags(chat: Conversation) -> list[dict[str, Any]]:
    return [{name: turn[name] for name in turn if name != "train"} for turn in chat.messages]


@pytest.mark.parametrize(
    ("form", "row"),
    [
        (Alpaca(instruction="ask", input="with", output="say"), {"ask": "q", "say": "a"}),
        (PromptCompletion(prompt="ask", completion="say"), {"ask": "q", "say": "a"}),
        (Chat(messages="talk"), {"talk": [{"role": "user", "content": "q"}]}),
        (Text(text="body"), {"body": "q"}),
    ],
)
def test_columns_can_be_renamed(form: formats.Format, row: dict[str, Any]) -> None:
    assert form.matches(row)
    assert form.parse(row)
    assert not form.matches({"other": "q"})
    with pytest.raises(ValueError, match="is missing.*'other'"):
        form.parse({"other": "q"})


@pytest.mark.parametrize(
    ("form", "row", "complaint"),
    [
        (Alpaca(), {"instruction": "q"}, "'output' is missing"),
        (Alpaca(), {"instruction": 5, "output": "a"}, "'instruction' must be a string, not int"),
        (Alpaca(), {"instruction": "q", "input": 0, "output": "a"}, "'input' must be a string"),
        (PromptCompletion(), {"prompt": "q", "completion": None}, "'completion'.* not NoneType"),
        (Text(), {"text": ["a"]}, "'text' must be a string, not list"),
        (Chat(), {"messages": "hi"}, "'messages' must be a list of messages, not str"),
        (Chat(), {"messages": []}, "'messages' holds no message"),
        (Chat(), {"messages": [*CHAT, "hi"]}, r"messages\[3\] must be an object, not str"),
        (Chat(), {"messages": [{"role": "robot", "content": ""}]}, r"messages\[0\].*'robot'"),
        (Chat(), {"messages": [{"role": "user"}]}, r"messages\[0\] needs a string 'content'"),
        (Chat(), {"messages": [{"content": "q"}]}, r"messages\[0\] needs a string 'role'"),
        (Chat(), {"conversations": [{"from": "gpt", "value": 1}]}, "needs a string 'value'"),
        (
            Chat(),
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
            r"messages\[0\].tool_calls needs a function with a 'name'",
        ),
        (
            Chat(),
            {"messages": [{"role": "assistant", "content": "", "weight": 0.5}]},
            r"messages\[0\].weight is 0.5",
        ),
        (
            Chat(),
            {"messages": [{"role": "assistant", "content": "", "weight": 0, "train": True}]},
            r"messages\[0\] says different things under train and weight",
        ),
        (
            Chat(),
            {"messages": [{"role": "assistant", "content": "", "reasoning": "a", "thinking": "b"}]},
            r"messages\[0\] says different things under reasoning and thinking",
        ),
        (
            Chat(),
            {"messages": [{"role": "user", "content": "a", "value": "b"}]},
            r"messages\[0\] says different things under content and value",
        ),
        (
            Chat(),
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            r"messages\[0\].content has a part that is no text \(image_url\)",
        ),
        (Chat(), {"messages": CHAT, "tools": "[{"}, "tools is a string that is not JSON"),
        (Chat(), {"messages": CHAT, "system": "be rude"}, "another message of the role system"),
        (Alpaca(), {"instruction": "", "output": "", "history": ["q"]}, r"history\[0\] must be a"),
        (Segments(), {"segments": [{"text": "a", "label": 1}]}, r"segments\[0\] needs"),
    ],
)
def test_refuses_what_it_cannot_read(
    form: formats.Format, row: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        form.parse(row)


def test_a_format_has_the_name_of_its_choice() -> None:
    for kind in formats.available():
        assert formats.named(kind.__module__.rpartition(".")[2]) == kind()
    with pytest.raises(
        ValueError, match="There are: alpaca, chat, prompt_completion, segments, text"
    ):
        formats.named("alpacca")


def test_unknown_keys_are_named_beside_those_that_each_format_wants() -> None:
    with pytest.raises(ValueError) as caught:
        detect({"question": "q", "answer": "a"})
    for part in ["['answer', 'question']", *(kind().wants for kind in available())]:
        assert part in str(caught.value)


def test_a_new_file_is_a_new_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "quiz.py").write_text(
        "class Quiz:\n"
        "    wants = '{q, a}'\n"
        "    def matches(self, row): return 'q' in row\n"
        "    def parse(self, row): return row['q'] + row['a']\n"
    )
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(tmp_path)])
    available.cache_clear()
    try:
        assert detect({"q": "1", "a": "2"}).parse({"q": "1", "a": "2"}) == "12"
    finally:
        available.cache_clear()


def called(function: dict[str, Any]) -> dict[str, Any]:
    turn = {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}
    return {"messages": [TURNS[0], turn]}


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (called({"name": "f", "parameters": {"x": 1}}), "no 'arguments', but 'parameters'"),
        (called({"name": "f", "arguments": '{"x": "\\ud83d"}'}), "surrogates not allowed"),
        (called({"name": "f", "arguments": {"x": date(2026, 1, 1)}}), "date is not JSON"),
    ],
)
def test_a_call_is_read_whole_or_not_at_all(row: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Chat().parse(row)


@pytest.mark.parametrize("arguments", [None, "", "null", "{}"])
def test_a_call_may_have_no_arguments(arguments: str | None) -> None:
    chat = Chat().parse(called({"name": "f", "arguments": arguments}))
    assert chat.messages[1]["tool_calls"][0]["function"]["arguments"] == {}


def test_of_two_columns_of_messages_the_other_is_not_read_without_a_word() -> None:
    row = {"messages": TURNS, "conversations": CHAT}
    assert Chat().parse(row).messages == TURNS
    assert Chat().unread(row) == ["conversations"]
    row = {"messages": None, "conversations": CHAT}  # as in a table of both
    assert Chat().parse(row).messages == CHAT
    assert Chat().unread(row) == []


def test_unknown_columns_are_answered_with_names_that_the_command_line_takes() -> None:
    with pytest.raises(Refusal) as refused:
        detect({"question": "q", "answer": "a"})
    said = refused.value.on_command_line
    assert "prompt_completion: {prompt, completion}" in said
    settings = said.partition("as in ")[2].rstrip(".").split()
    assert composed(settings)["data"]["format"]["prompt"] == "question"


@pytest.mark.parametrize(
    "row, told",
    [
        ("instruction input answer", "data/format=alpaca data.format.output=answer"),
        ("prompt reply", "data/format=prompt_completion data.format.completion=reply"),
        ("question answer", "data.format.prompt=question"),  # which is which?
        ("prompt reply answer", "data.format.prompt=question"),
        ("prompt system", "data.format.prompt=question"),  # no answer
        ("query completion", "data/format=prompt_completion data.format.prompt=query"),
    ],
)
def test_a_row_that_misses_one_column_is_answered_with_the_setting_that_reads_it(row, told):
    with pytest.raises(ValueError, match="no format fits") as error:
        detect(dict.fromkeys(row.split(), ""))
    assert told in message_on_command_line(error.value)
