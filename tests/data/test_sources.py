from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lit_ft.data.conversation import chat_of
from lit_ft.data.files import READERS
from lit_ft.data.formats.alpaca import Alpaca
from lit_ft.data.rows import ParsedRow
from lit_ft.data.sources import Files, Hub, open_source, parse
from tests.support.data_files import lines, write

ROWS = [{"prompt": f"q{i}", "completion": f"a{i} é\u2028!"} for i in range(100)]
BAD_LINES: list[tuple[bytes, str]] = [
    (b'{"prompt": "q", ', "not valid JSON: "),
    (b"[1, 2]", "a row must be an object, not list"),
    (b'{"prompt": "q"}', "the field 'completion' is missing"),
    (b'{"prompt": "q", "completion": 7}', "the field 'completion' must be a string, not int"),
    (b'{"prompt": "q", "completion": "\xe9"}', r"not UTF-8 \(byte 0xe9 at column 32\)"),
    (b'{"prompt": "q", "completion": "\\ud83d"}', "holds half of a .u surrogate pair"),
    (b"[" * 100_000, "not valid JSON: "),
]


def conversations(path: Path) -> list[Any]:
    return [said(row) for row in parse(open_source(str(path)))]


def said(row: ParsedRow) -> Any:
    """Return a row's text or its messages."""
    chat = chat_of(row.content)
    return row.content if chat is None else chat.messages


@pytest.mark.parametrize(("line", "complaint"), BAD_LINES)
def test_a_bad_line_is_refused_by_file_and_number(
    tmp_path: Path, line: bytes, complaint: str
) -> None:
    text = lines(ROWS)
    text[56] = line
    file = tmp_path / "my.jsonl"
    file.write_bytes(b"\n".join(text))
    with pytest.raises(ValueError, match=r"my\.jsonl:57: " + complaint):
        list(parse(open_source(str(file))))


def test_a_csv_row_of_another_length_is_one_bad_row(tmp_path: Path) -> None:
    (tmp_path / "my.csv").write_text("prompt,completion\nq,a\nq\nq,a,x\nq,b\n")
    rows = list(open_source(str(tmp_path / "my.csv")).rows())
    assert [row.fields["completion"] for row in (rows[0], rows[3])] == ["a", "b"]  # type: ignore[index]
    for row in rows[1:3]:
        assert isinstance(row.fields, ValueError)
        assert "differ in length" in str(row.fields)


def test_blank_lines_are_skipped_but_counted(tmp_path: Path) -> None:
    file = tmp_path / "my.jsonl"
    file.write_bytes(b"\n".join([b"", *lines(ROWS[:2]), b"  ", *lines(ROWS[2:3]), b"{"]))
    with pytest.raises(ValueError, match=r"my\.jsonl:6: not valid JSON"):
        list(parse(open_source(str(file))))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".json"])
def test_byte_order_mark_and_carriage_returns_are_no_part_of_the_data(
    tmp_path: Path, suffix: str
) -> None:
    plain = write(tmp_path / f"plain{suffix}", ROWS)
    expected = conversations(plain)
    text = plain.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    marked = tmp_path / f"marked{suffix}"
    marked.write_bytes(b"\xef\xbb\xbf" + text)
    assert conversations(marked) == expected
    assert len(expected) == len(ROWS)
    assert expected[0][1]["content"] == "a0 é\u2028!"


TABLES = [kind for kind in READERS if kind != ".txt"]


@pytest.mark.parametrize("suffix", [*TABLES, ".jsonl.gz", ".jsonl.zst", ".csv.gz", ".json.zst"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    rows = [
        {"prompt": "007", "completion": answer} for answer in ("NA", "", " 1.0\n2,", "x" * 200_000)
    ]
    expected = [[*map(str, row.values())] for row in rows]
    found = conversations(write(tmp_path / f"my{suffix}", rows))
    assert [[turn["content"] for turn in turns] for turns in found] == expected


@pytest.mark.parametrize(
    ("suffix", "origin"),
    [(".jsonl", ":57"), (".json", " row 57"), (".csv", ":58"), (".parquet", " row 57")],
)
def test_every_kind_of_file_names_the_row_that_does_not_fit(
    tmp_path: Path, suffix: str, origin: str
) -> None:
    rows = [dict(messages=[dict(role="user", content="q")]) for _ in range(100)]
    rows[56] = dict(messages=[dict(role="robot", content="q")])
    if suffix == ".csv":  # whose values are strings
        rows = [dict(text="t") for _ in range(100)]
    file = write(tmp_path / f"my{suffix}", rows)
    if suffix == ".csv":
        text = file.read_bytes().split(b"\r\n")
        text[57] += b",one too many"
        file.write_bytes(b"\r\n".join(text))
    with pytest.raises(ValueError, match=rf"my{suffix}{origin}: "):
        list(parse(open_source(str(file))))


def test_a_parquet_file_is_the_one_that_is_named(tmp_path: Path) -> None:
    for name in ("m*.parquet", "many.parquet", "my[1].parquet"):
        write(tmp_path / name, [{"text": name}])
    for name in ("m*.parquet", "my[1].parquet"):
        [row] = parse(open_source(str(tmp_path / name)))
        assert name in str(row.content)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("my.jsonl", b"", "the file has no rows"),
        ("my.jsonl", b"\n \n", "the file has no rows"),
        ("my.json", b"[]", "the file has no rows"),
        ("my.json", b'[{"text": "a"}', "not valid JSON"),
        ("my.json", b'[{"text": "a"}, 3]', "my.json row 2: a row must be an object"),
        ("my.csv", b"text\r\n", "the file has no rows"),
        ("my.csv", b"text\r\n\xe9\r\n", "not UTF-8"),
        ("my.csv", b"text,text\r\na,b\r\n", "two columns have the same name"),
        ("my.csv", b'text\r\n"a"b\r\n', "my.csv:2: not valid CSV"),
        ("my.parquet", b"PAR1", "not a readable parquet file"),
        ("my.doc", b"text", "unknown file type '.doc'; known are .jsonl, .json, .csv, .tsv"),
        ("my.txt", b" \n", "the file has no rows"),
        ("my.txt", b"\xe9", "not UTF-8"),
        ("my.jsonl.gz", b"text", "cannot be decompressed"),
        ("my.json", b'{"a": [1, 2], "b": [1]}', "the columns differ in length"),
    ],
)
def test_unreadable_files_are_refused_by_name(
    tmp_path: Path, name: str, content: bytes, complaint: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=complaint) as caught:
        list(parse(open_source(str(tmp_path / name))))
    assert str(tmp_path / name) in str(caught.value)


def test_json_lines_may_be_called_json(tmp_path: Path) -> None:
    file = write(tmp_path / "my.jsonl", ROWS).rename(tmp_path / "my.json")
    assert conversations(file) == [said(row) for row in parse(Files("x", [file]))]
    assert len(conversations(file)) == len(ROWS)


def test_a_folder_is_its_files_in_order(tmp_path: Path) -> None:
    write(tmp_path / "b.csv", ROWS[50:])
    write(tmp_path / "a.jsonl", ROWS[:50])
    (tmp_path / "README.md").write_text("no data")
    rows = list(parse(open_source(str(tmp_path))))
    assert [said(row)[0]["content"] for row in rows] == [row["prompt"] for row in ROWS]
    assert rows[49].origin == f"{tmp_path / 'a.jsonl'}:50"


@pytest.mark.parametrize("name", ["b.jsonl.bak", "more/b.csv", "more/b.parquet.zst"])
def test_a_folder_is_not_read_in_part(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a.jsonl", ROWS)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "a.json").touch()
    assert len(list(open_source(str(tmp_path)).rows())) == len(ROWS)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=rf"\({name}\)\. Unpack .*split.*train"):
        open_source(str(tmp_path))


def test_a_folder_of_splits_is_not_trained_on_whole(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "test.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"splits of a dataset.*val_path"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_in_the_hubs_layout_is_read_by_split(tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train-00000-of-00001.parquet", ROWS[:9])
    write(tmp_path / "data" / "test-00000-of-00001.parquet", ROWS[9:20])
    train = list(parse(open_source(str(tmp_path), streaming=streaming)))
    test = list(parse(open_source(str(tmp_path), split="test", streaming=streaming)))
    assert [said(row)[0]["content"] for row in train + test] == [f"q{i}" for i in range(20)]
    assert test[2].origin == f"{tmp_path}[test] row 3"
    with pytest.raises(ValueError, match=r"\[test\] row 1: the field 'output' is missing"):
        list(parse(open_source(str(tmp_path), split="test"), Alpaca(instruction="prompt")))
    with pytest.raises(ValueError, match=r"cannot|can be loaded .*dev"):
        list(open_source(str(tmp_path), split="dev").rows())


def test_unknown_paths_are_refused_at_once_with_the_nearest_name(tmp_path: Path) -> None:
    write(tmp_path / "chats.jsonl", ROWS)
    with pytest.raises(ValueError, match="chat.jsonl: no such file; did you mean .*/chats.jsonl"):
        open_source(str(tmp_path / "chat.jsonl"))
    with pytest.raises(ValueError, match="no such file"):
        open_source("nowhere.csv")
    assert isinstance(open_source("someone/dataset"), Hub)


def test_options_that_nothing_takes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"takes no options.*'split'"):
        open_source(str(write(tmp_path / "my.jsonl", ROWS)), split="train")


def test_identity_follows_the_content(tmp_path: Path) -> None:
    file = write(tmp_path / "my.jsonl", ROWS)
    before = open_source(str(file)).identity()
    file.write_bytes(file.read_bytes())
    assert open_source(str(file)).identity() == before
    write(file, ROWS[:-1] + [{"prompt": "q99", "completion": "a98 é\u2028!"}])
    assert open_source(str(file)).identity() != before


@pytest.mark.parametrize("options", [{}, {"data_files": "my.parquet"}])
def test_a_table_gives_no_call_the_arguments_of_another(
    tmp_path: Path, options: dict[str, str]
) -> None:
    arguments: list[dict[str, str]] = [{"city": "Rome"}, {"date": "now"}]
    rows = [
        {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": one}]}]}
        for one in arguments
    ]
    file = write(tmp_path / "my.parquet", rows)
    found = parse(open_source(str(tmp_path if options else file), **options))
    calls = [said(row)[0]["tool_calls"][0]["function"]["arguments"] for row in found]
    assert calls == arguments


def test_the_tools_of_a_single_row_are_not_the_rows(tmp_path: Path) -> None:
    file = tmp_path / "my.json"
    messages = [{"role": "user", "content": "q"}]
    file.write_text(json.dumps({"messages": messages, "tools": [{"name": "f"}]}, indent=1))
    assert conversations(file) == [messages]


def test_suffixes_may_be_capitals(tmp_path: Path) -> None:
    file = write(tmp_path / "my.jsonl.gz", ROWS).rename(tmp_path / "MY.JSONL.GZ")
    assert len(conversations(file)) == len(ROWS)
