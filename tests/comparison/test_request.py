"""What `python -m lit_ft.compare` makes of its arguments."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lit_ft.comparison.request import request_of
from lit_ft.run.arguments import CONF

FILE = CONF / "experiment" / "compare_methods.yaml"


def test_an_experiment_lists_the_methods() -> None:
    section = OmegaConf.load(FILE).compare
    request = request_of(["experiment=compare_methods", "run_dir=mine"])
    assert request.folder == Path("mine")
    assert [method[1:-1] for method in request.grid.methods] == [
        tuple(text.split()) for text in section.methods
    ]
    assert request.grid.tune and request.grid.seeds == (0,)


def test_quick_adds_settings_that_the_command_line_overrides() -> None:
    given = ["experiment=compare_methods", "quick=true", "trainer.max_steps=3", "seed=1,2"]
    grid = request_of(given).grid
    assert not grid.tune and grid.seeds == (1, 2)
    for method in grid.methods:
        steps = [one for one in method if one.startswith("trainer.max_steps=")]
        assert len(steps) == 2 and steps[-1] == "trainer.max_steps=3"
        assert [one for one in method if one.startswith("compare.")] == ["compare.methods=[]"]
    assert request_of(["experiment=compare_methods", "quick=false"]).grid.tune


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("compare.seeds=3", "compare.seeds=3: must be"),
        ("compare.seeds=[]", "compare.seeds is empty"),
        ("compare.tune=maybe", "compare.tune=maybe: must be"),
        ("compare.methods=adamw", "compare.methods=adamw: must be"),
        ("compare.methods=['optim=sgd trusted_packages=[mine]']", "may give trust, to all methods"),
        ("compare.quick=['eval.include_path=mine']", "only the command line may give trust"),
        ("hparams_search=rates", "hparams_search=rates: there is no such choice"),
    ],
)
def test_what_no_run_would_check_is_named(setting: str, named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        request_of([setting])


def test_a_file_of_a_search_stands_for_its_values() -> None:
    grid = request_of(["hparams_search=learning_rate", "optim=adamw,sgd"]).grid
    assert grid.rates == (3e-5, 1e-4, 3e-4) and len(grid.methods) == 2


def test_paths_are_read_as_people_type_them(tmp_path: Path) -> None:
    file = tmp_path / "my (1), old.jsonl"
    file.write_text("{}")
    request = request_of([f"data.path={file}", f"run_dir={tmp_path}/my runs"])
    assert request.folder == tmp_path / "my runs" and len(request.grid.methods) == 1


def test_quick_needs_settings_that_say_what_it_is() -> None:
    with pytest.raises(ValueError, match="experiment=compare_methods"):
        request_of(["optim=adamw,sgd", "quick=true"])
    with pytest.raises(ValueError, match="quick=yes: must be true or false"):
        request_of(["quick=yes"])
