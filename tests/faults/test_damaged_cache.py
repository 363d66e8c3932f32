"""A cache entry that is damaged is seen, and built again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lit_ft.data.cache import cached
from tests.support.datamodules import table, value


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIT_FT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [_truncate, _flip_a_bit, _empty, Path.unlink])
@pytest.mark.parametrize("victim", ["*.arrow", "state.json", "checksums.json"])
def test_a_damaged_entry_is_rebuilt(
    folder: Path, damage: Callable[[Path], None], victim: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert value(cached("key", table(1))) == 1
    (file,) = (folder / "key").glob(victim)
    damage(file)
    assert value(cached("key", table(2))) == 2
    assert "damaged cache entry" in caplog.text
    assert value(cached("key", table(3))) == 2
    assert [entry.name for entry in folder.iterdir()] == ["key"]
