"""Damage of any kind is noticed before a file is used, and harmless bytes change nothing."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_ft.storage.atomic import keep_copy, keep_earlier, write_text
from lit_ft.storage.damage import damage, write_checksums

STATE = {"weight": torch.arange(3000.0), "loops": {"step": 7}, "names": ["a", "é"] * 50}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("saved") / "last.ckpt"
    torch.save(STATE, file)
    return file


def same(path: Path) -> bool:
    loaded = torch.load(path, weights_only=True)
    return torch.equal(loaded["weight"], STATE["weight"]) and all(
        loaded[name] == STATE[name] for name in ("loops", "names")
    )


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_noticed_or_changes_nothing(
    saved: Path, tmp_path: Path, place: float, bit: int
) -> None:
    content = bytearray(saved.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(content)
    assert damage(broken) is not None or same(broken)


def test_bits_of_the_weights_are_all_noticed(saved: Path, tmp_path: Path) -> None:
    content = saved.read_bytes()
    start = content.index(STATE["weight"].numpy().tobytes())
    for place in random.Random(0).sample(range(8 * 12_000), 100):
        broken = bytearray(content)
        broken[start + place // 8] ^= 1 << place % 8
        (tmp_path / "broken.ckpt").write_bytes(broken)
        assert "checksum of its record" in str(damage(tmp_path / "broken.ckpt"))


@given(share=st.floats(0, 1, exclude_max=True))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_truncated_file_is_noticed(saved: Path, tmp_path: Path, share: float) -> None:
    content = saved.read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(content[: int(share * len(content))])
    assert damage(tmp_path / "cut.ckpt") is not None


def test_a_whole_file_and_a_whole_folder_are_taken(saved: Path, tmp_path: Path) -> None:
    assert damage(saved) is None
    (tmp_path / "a").write_bytes(b"12")
    assert damage(tmp_path) is None  # of an earlier version
    write_checksums(tmp_path)
    assert damage(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "a").write_bytes(b"13"), "the checksum of its file a is wrong"),
        (lambda folder: (folder / "a").unlink(), "its file a is missing"),
        (lambda folder: (folder / "checksums.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "checksums.json").write_text("[1]"), "cannot be read"),
    ],
)
def test_a_changed_folder_is_noticed(tmp_path: Path, change, said: str) -> None:
    (tmp_path / "a").write_bytes(b"12")
    write_checksums(tmp_path)
    change(tmp_path)
    assert said in str(damage(tmp_path))


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_earlier_states_are_kept_when_the_last_is_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "last.ckpt"

    def content(place: Path) -> str:
        return (place / "x" if kind == "folder" else place).read_text()

    for number in range(5):
        keep_earlier(path, 3)
        new = tmp_path / "new"
        if kind == "folder":
            new.mkdir()
        (new / "x" if kind == "folder" else new).write_text(str(number))
        if path.is_dir():
            path.rename(tmp_path / "gone")
            new.rename(path)
            os.unlink(tmp_path / "gone" / "x")
            (tmp_path / "gone").rmdir()
        else:
            new.replace(path)
    found = {place.name: content(place) for place in tmp_path.iterdir()}
    assert found == {"last.ckpt": "4", "last-1.ckpt": "3", "last-2.ckpt": "2"}


def test_a_file_system_without_hard_links_gets_a_copy(tmp_path: Path, monkeypatch) -> None:
    def none(*_: object) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", none)
    (tmp_path / "a").write_text("1")
    keep_copy(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a").write_text("2")
    assert (tmp_path / "b").read_text() == "1"


def test_a_small_file_is_replaced_whole(tmp_path: Path, monkeypatch) -> None:
    write_text(tmp_path / "best.json", "old")

    def torn(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync", torn)
    with pytest.raises(OSError, match="full"):
        write_text(tmp_path / "best.json", "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("best.json", "old")]
