from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lit_ft.data import cache
from lit_ft.data.cache import cache_folder, cache_key, cached
from lit_ft.data.encoding import Encoder
from lit_ft.data.formats.prompt_completion import PromptCompletion
from lit_ft.data.sources import open_source
from lit_ft.data.tables import encode_source
from tests.support.datamodules import table, value


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIT_FT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(20)]
    (tmp_path / "my.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "my.jsonl"


def test_the_folder_is_the_users_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache" / "data"
    monkeypatch.delenv("LIT_FT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "lit_ft" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "lit_ft" / "data"


@dataclass
class Ingredients:
    file: Path
    format: Any
    encoder: Encoder

    def key(self) -> str:
        return cache_key(open_source(str(self.file)), self.format, self.encoder)


def _content(one: Ingredients, _: pytest.MonkeyPatch) -> None:
    one.file.write_bytes(one.file.read_bytes().replace(b"q7", b"q8"))


def _format(one: Ingredients, _: pytest.MonkeyPatch) -> None:
    one.format = None


def _columns(one: Ingredients, _: pytest.MonkeyPatch) -> None:
    one.format = PromptCompletion(prompt="completion")


def _max_length(one: Ingredients, _: pytest.MonkeyPatch) -> None:
    one.encoder = replace(one.encoder, max_length=65)


def _drop_overlong(one: Ingredients, _: pytest.MonkeyPatch) -> None:
    one.encoder = replace(one.encoder, overlong="drop")


def _chat_template(one: Ingredients, _: pytest.MonkeyPatch) -> None:
    one.encoder.tokenizer.chat_template += " "  # type: ignore[operator]


def _vocabulary(one: Ingredients, _: pytest.MonkeyPatch) -> None:
    one.encoder.tokenizer.add_tokens(["q1"])


def _special_tokens(one: Ingredients, _: pytest.MonkeyPatch) -> None:
    one.encoder.tokenizer.eos_token = "<|endoftext|>"


def _code(one: Ingredients, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cache, "_code_digest", lambda: "other code")


def _versions(one: Ingredients, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cache, "version", lambda name: "0")


@pytest.mark.parametrize(
    "change",
    [
        _content,
        _format,
        _columns,
        _max_length,
        _drop_overlong,
        _chat_template,
        _vocabulary,
        _special_tokens,
        _code,
        _versions,
    ],
)
def test_everything_that_shapes_the_data_changes_the_key(
    file: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Ingredients, pytest.MonkeyPatch], None],
) -> None:
    ingredients = Ingredients(file, PromptCompletion(), Encoder(tokenizer, 64))
    before = ingredients.key()
    assert ingredients.key() == before
    change(ingredients, monkeypatch)
    assert ingredients.key() != before


def test_the_code_that_is_hashed_is_the_data_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cache.py", "encoding.py"):
        (tmp_path / name).write_text("x = 1")
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "cache.py"))
    before = cache._code_digest.__wrapped__()
    (tmp_path / "encoding.py").write_text("x = 2")
    assert cache._code_digest.__wrapped__() != before


def test_a_hit_equals_a_miss_and_reads_no_row(
    file: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, encoder = open_source(str(file)), Encoder(tokenizer, 64)
    miss = encode_source(source, None, encoder)
    assert miss[7]["origin"] == f"{file}:8"
    monkeypatch.setattr(type(source), "rows", lambda self: pytest.fail("the source was read"))
    hit = encode_source(source, None, encoder)
    assert hit.features == miss.features
    assert hit.to_list() == miss.to_list()


def test_errors_reach_the_user_and_leave_nothing_behind(
    file: Path, folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    file.write_text(file.read_text() + "\n{")
    with pytest.raises(ValueError, match=r"my\.jsonl:21: not valid JSON"):
        encode_source(open_source(str(file)), None, Encoder(tokenizer, 64))
    assert list(folder.iterdir()) == []


def test_what_filter_writes_beside_a_table_does_no_damage(folder: Path) -> None:
    cached("key", table(1)).filter(lambda row: row["value"] == 1)
    assert list(folder.glob("key/cache-*.arrow"))
    assert value(cached("key", table(2))) == 1  # read, not built anew


def test_of_two_that_race_one_writes_and_both_read(folder: Path) -> None:
    meet = threading.Barrier(2)
    found: list[int] = []

    def race(number: int) -> None:
        def build(scratch: Path) -> Any:
            built = table(number)(scratch)
            meet.wait(timeout=30)  # both have found nothing, and both will write
            return built

        found.append(value(cached("key", build)))

    threads = [threading.Thread(target=race, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert found[0] == found[1] == value(cached("key", table(3)))
    assert [entry.name for entry in folder.iterdir()] == ["key"]
