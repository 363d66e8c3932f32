"""Paths as people type them reach the configuration as they are."""

from __future__ import annotations

import json

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from lit_ft.run.arguments import PATHS, quoted_paths
from tests.support.commands import TINY, run


def read(argument: str) -> object:
    return OverridesParser.create().parse_override(argument).value()


# No text of Hydra's own: ${...} is filled in, also between quotes.
names = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(
    lambda name: "${" not in name and "," not in name and name.strip() == name
)


@given(st.sampled_from(PATHS), names)
def test_any_path_is_read_as_it_is(setting, name):
    [argument] = quoted_paths([f"{setting}={name}"])
    value = read(argument)
    assert value == name or (value is None and name.lower() == "null") or is_quoted(name)
    assert quoted_paths([argument]) == [argument]


def is_quoted(name: str) -> bool:
    return name[0] in "'\"[{" or "(" in name  # what Hydra itself reads in another way


@pytest.mark.parametrize(
    "argument",
    [
        "optim.lr=1e-4,1e-3",
        "callbacks=[default,early_stopping]",
        "resume=null",
        "run_dir=runs/${now:%Y}",
        "~callbacks.samples",
        "data.path='a b.jsonl'",
        "--multirun",
        "-m",
        "run_dir=",
    ],
)
def test_other_arguments_stay_as_they_are(argument):
    assert quoted_paths([argument]) == [argument]


def test_a_file_that_exists_is_one_path_and_a_list_of_them_a_sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.jsonl", "c (1).jsonl", "d=1.jsonl", "2024", "[x].jsonl"):
        (tmp_path / name).touch()
    assert quoted_paths(["data.path=a,b.jsonl"]) == ["data.path='a,b.jsonl'"]
    assert quoted_paths(["data.path=2024"]) == ["data.path='2024'"]
    assert quoted_paths(["data.path=[x].jsonl"]) == ["data.path='[x].jsonl'"]
    sweep = ["data.path='c (1).jsonl','d=1.jsonl'"]
    assert quoted_paths(["data.path=c (1).jsonl,d=1.jsonl"]) == sweep
    (tmp_path / "true").touch()
    assert quoted_paths(["optim.fused=true"]) == ["optim.fused=true"]


def test_the_program_takes_such_paths(tmp_path):
    data = tmp_path / "données (1)=[a].jsonl"
    rows = [{"prompt": f"{i}?", "completion": str(i)} for i in range(8)]
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    folder = tmp_path / "run é (1)=[a]"
    status, output = run(f"data.path={data}", f"run_dir={folder}", *TINY, "trainer.max_steps=1")
    assert status == 0, output
    assert json.loads((folder / "summary.json").read_text())["status"] == "completed"
