"""Rows of every format: each of their texts is trained on, or refused, or counted by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lit_ft.data.encoded import EncodedRow
from lit_ft.data.encoding import Encoder
from lit_ft.data.sources import open_source, parse

END = "<|im_end|>"
# Any character of UTF-8 except those of control tokens, in short and in long texts.
characters = st.characters(codec="utf-8", exclude_characters="<>|")
texts = st.one_of(st.text(characters, max_size=20), st.text(characters, max_size=300))


class Case(NamedTuple):
    """A row, and what must become of it.

    Args:
        row: The row as it stands in a file.
        answers: The texts to learn, in order; None if the row is plain text.
        texts: All texts of the row.
        unread: The keys that no format reads.
    """

    row: dict[str, Any]
    answers: list[str] | None
    texts: list[str]
    unread: list[str]


@st.composite
def contents(draw: st.DrawFn) -> tuple[Any, str]:
    """Draw the content of a message, and the text that it is: a string, or a list of parts."""
    if draw(st.booleans()):
        text = draw(texts)
        return text, text
    parts = draw(st.lists(texts, min_size=1, max_size=3))
    return [{"type": "text", "text": part} for part in parts], "".join(parts)


@st.composite
def chats(draw: st.DrawFn) -> Case:
    sharegpt = draw(st.booleans())
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    names = ("system", "human", "gpt") if sharegpt else ("system", "user", "assistant")
    turns, answers, said, unread = [], [], [], []

    def say(role: str) -> tuple[dict[str, Any], str]:
        content, text = draw(contents())
        said.append(text)
        turns.append({role_key: role, content_key: content})
        return turns[-1], text

    if draw(st.booleans()):
        say(names[0])
    for _ in range(draw(st.integers(1, 4))):
        user, question = say(names[1])
        answer, text = say(names[2])
        learnt = True
        if draw(st.booleans()):
            learnt = draw(st.booleans())
            key = draw(st.sampled_from(["train", "weight", "loss"]))
            answer[key] = learnt if key == "train" else int(learnt)
        if draw(st.integers(0, 5)) == 0:
            user["train"] = True
            answers.append(question)
        if learnt:
            answers.append(text)
        if draw(st.integers(0, 5)) == 0:
            answer["mood"] = "good"
            unread = ["conversations[].mood" if sharegpt else "messages[].mood"]
    row: dict[str, Any] = {"conversations" if sharegpt else "messages": turns}
    if turns[0][role_key] != "system" and draw(st.booleans()):
        row["system"] = draw(texts)
        said.append(row["system"])
    return Case(row, answers, said, unread)


@st.composite
def alpacas(draw: st.DrawFn) -> Case:
    row: dict[str, Any] = {"instruction": draw(texts), "output": draw(texts)}
    if draw(st.booleans()):
        row["input"] = draw(texts)
    pairs = draw(st.lists(st.tuples(texts, texts), max_size=2))
    if pairs or draw(st.booleans()):
        row["history"] = [list(pair) for pair in pairs]
    if draw(st.booleans()):
        row["system"] = draw(texts)
    said = [value for value in row.values() if isinstance(value, str)]
    said += [text for pair in pairs for text in pair]
    return Case(row, [*(answer for _, answer in pairs), row["output"]], said, [])


@st.composite
def prompts(draw: st.DrawFn) -> Case:
    prompt, completion = draw(texts), draw(texts)
    row: dict[str, Any] = {"prompt": prompt, "completion": completion}
    said = [prompt, completion]
    if draw(st.booleans()):
        earlier = draw(texts)
        said.append(earlier)
        row["prompt"] = [
            {"role": "assistant", "content": earlier},
            {"role": "user", "content": prompt},
        ]
    unread = ["category"] if draw(st.booleans()) else []
    return Case({**row, **dict.fromkeys(unread, "x")}, [completion], said, unread)


@st.composite
def segments(draw: st.DrawFn) -> Case:
    pieces = draw(st.lists(st.tuples(texts, st.booleans()), min_size=2, max_size=4))
    row = {"segments": [{"text": text, "label": label} for text, label in pieces]}
    return Case(row, None, [text for text, _ in pieces], [])


@st.composite
def plain(draw: st.DrawFn) -> Case:
    text = draw(texts)
    return Case({"text": text}, None, [text], [])


def encoded(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], folder: Path) -> EncodedRow:
    """Encode a row on its way from a file."""
    file = folder / "my.jsonl"
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    [one] = Encoder(tokenizer, 100_000)(parse(open_source(str(file))))
    return one


@pytest.mark.slow
@settings(max_examples=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=st.one_of(chats(), alpacas(), prompts(), segments(), plain()))
def test_every_text_of_a_row_is_there_and_the_answers_are_learnt(
    case: Case, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    row = encoded(tokenizer, case.row, tmp_path)
    decoded = tokenizer.decode(row.input_ids)
    assert all(text in decoded for text in case.texts)
    assert [key for key in case.unread if not any(f"{key!r}" in note for note in row.notes)] == []
    targets = tokenizer.decode([label for label in row.labels if label != -100])
    if case.answers is not None:
        assert targets == "".join(answer + END for answer in case.answers)
    elif "text" in case.row:
        ends = decoded.endswith(END)
        assert ends and decoded.removesuffix(END) == case.row["text"].removesuffix(END)
    else:
        pieces = [(tokenizer(one["text"]).input_ids, one["label"]) for one in case.row["segments"]]
        expected = [id if label else -100 for ids, label in pieces for id in ids]
        assert row.labels[1:] == expected[1:]  # nothing predicts the first token of a row
