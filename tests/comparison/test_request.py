"""What `python -m lit_ft.compare` makes of its arguments."""

from __future__ import annotations

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


def test_quick_needs_settings_that_say_what_it_is() -> None:
    with pytest.raises(ValueError, match="experiment=compare_methods"):
        request_of(["optim=adamw,sgd", "quick=true"])
    with pytest.raises(ValueError, match="quick=yes: must be true or false"):
        request_of(["quick=yes"])
