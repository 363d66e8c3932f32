"""Data that is not a file, and JSON rows that would silently lose a part."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lit_ft.data.files import read
from lit_ft.data.sources import Files, open_source
from lit_ft.datamodule import InstructionDataModule
from tests.support.tokenizer import byte_level_tokenizer

ROW = {"prompt": "q", "completion": "a"}


def link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


OTHERS: dict[str, Callable[[Path], None]] = {
    "a FIFO": os.mkfifo,
    "a folder": Path.mkdir,
    "a socket": bind,
    "a device": link("/dev/zero"),
    "a link to nothing": link("nowhere"),
    "a loop of links": link("b.jsonl"),
}


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """A socket's path is at most 100 bytes long, so it is made by its name."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_file_is_named_and_never_opened(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(ROW) + "\n" for _ in range(40)))
    with inside(tmp_path):
        OTHERS[kind](Path("b.jsonl"))
    source = open_source(str(tmp_path))
    assert isinstance(source, Files)
    assert (len(list(source.rows())), source.others) == (40, (f"b.jsonl ({kind})",))
    data = InstructionDataModule(str(tmp_path), tokenizer=byte_level_tokenizer())
    caplog.set_level("INFO")
    data.prepare_data()
    data.setup()
    assert f"no files, and not read: b.jsonl ({kind})." in caplog.text
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(ValueError, match=rf"holds only b\.jsonl \({kind}\)"):
        open_source(str(tmp_path))
    alone = "a folder that holds nothing" if kind == "a folder" else f"{kind}, not a file"
    with pytest.raises(ValueError, match=rf"b\.jsonl is {alone}"):
        open_source(str(tmp_path / "b.jsonl"))


@pytest.mark.timeout(60)
def test_a_chat_template_is_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "template.jinja")
    with pytest.raises(ValueError, match=r"template\.jinja: neither .*it is a FIFO"):
        InstructionDataModule(chat_template=str(tmp_path / "template.jinja"))


TWICE = '{"prompt": "q", "completion": "a", "prompt": "z"}'
NESTED = '{"messages": [{"role": "user", "content": "q", "role": "assistant"}]}'


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.jsonl", f"{json.dumps(ROW)}\n{TWICE}\n{json.dumps(ROW)}", ":2: .*'prompt' twice"),
        ("a.jsonl", f"{json.dumps(ROW)}\n{NESTED}\n{json.dumps(ROW)}", ":2: .*'role' twice"),
        ("a.json", f"{json.dumps(ROW)}\n{TWICE}\n{json.dumps(ROW)}", ":2: .*'prompt' twice"),
        ("a.json", f"[{json.dumps(ROW)},\n {NESTED},\n{json.dumps(ROW)}]", " row 2: .*'role'"),
        ("a.json", f'{{"rows": [{json.dumps(ROW)}, {TWICE}, {json.dumps(ROW)}]}}', r" rows\[1\]: "),
    ],
)
def test_a_key_that_stands_twice_is_an_error_of_its_row(
    tmp_path: Path, name: str, text: str, told: str
) -> None:
    (tmp_path / name).write_text(text)
    first, (origin, error), last = read(tmp_path / name)
    assert (first[1], last[1]) == (ROW, ROW)
    assert isinstance(error, ValueError)
    with pytest.raises(ValueError, match=name + told):
        raise ValueError(f"{origin}: {error}")


@pytest.mark.parametrize("text", ['{"text": ["a"], "text": ["b"]}', f"[{TWICE}] and more"])
def test_a_file_that_cannot_be_read_as_rows_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json: (an object has|not valid JSON)"):
        list(read(tmp_path / "a.json"))
