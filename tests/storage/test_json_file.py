from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_ft.storage.json_file import CHECKSUM, read_json, write_json

FIELDS = {"val_loss": 2.125, "steps": 40, "config": {"name": "é", "none": None, "list": [1, "x"]}}


@pytest.mark.parametrize("indent", [None, 2])
def test_each_flipped_bit_that_changes_anything_is_named(
    tmp_path: Path, indent: int | None
) -> None:
    file = tmp_path / "best.json"
    write_json(file, FIELDS, indent=indent)
    whole = file.read_bytes()
    assert read_json(file) == FIELDS
    harmless = 0
    for place in range(len(whole) * 8):
        content = bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        file.write_bytes(content)
        try:
            found = read_json(file)
        except ValueError as error:
            assert str(error).startswith(f"{file} is damaged: ")
        else:
            # In white space, or in the name of the checksum, which then is one more field.
            assert {name: found.get(name) for name in FIELDS} == FIELDS
            harmless += 1
    assert harmless < 100


@given(st.integers(0, 200))
def test_a_cut_file_is_named(tmp_path_factory: pytest.TempPathFactory, length: int) -> None:
    file = tmp_path_factory.mktemp("cut") / "best.json"
    write_json(file, FIELDS)
    whole = file.read_bytes()
    file.write_bytes(whole[: min(length, len(whole) - 2)])
    with pytest.raises(ValueError, match="is damaged"):
        read_json(file)


def test_a_file_without_a_checksum_is_read(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(json.dumps(FIELDS))
    assert read_json(tmp_path / "old.json") == FIELDS


def test_other_programs_read_the_fields(tmp_path: Path) -> None:
    write_json(tmp_path / "summary.json", {"path": Path("a")})
    found = json.loads((tmp_path / "summary.json").read_text())
    assert (found.pop("path"), list(found)) == ("a", [CHECKSUM])
