"""What a comparison is asked for, from the arguments of a sweep."""

from __future__ import annotations

import pytest

from lit_ft.comparison.grid import grid_of, in_full


def test_each_choice_of_each_swept_setting_is_a_method() -> None:
    grid = grid_of(["optim=adamw,sgd", "adapter=none,lora", "data.max_length=32"])
    assert grid.methods == tuple(
        (f"optim={optim}", f"adapter={adapter}", "data.max_length=32")
        for optim in ("adamw", "sgd")
        for adapter in ("none", "lora")
    )
    assert grid.swept == {"optim", "adapter"}
    assert grid.rates == () and grid.seeds == ()


def test_rates_and_seeds_are_no_methods() -> None:
    grid = grid_of(["optim=adamw", "optim.lr=1e-4,3e-4", "seed=range(1,4)"])
    assert grid.methods == (("optim=adamw",),)
    assert grid.rates == (1e-4, 3e-4) and grid.seeds == (1, 2, 3)
    assert grid_of(["seed=7"]).seeds == (7,)


def test_a_list_is_one_value() -> None:
    grid = grid_of(["galore.targets=[attention,mlp]", "~callbacks.samples"])
    assert grid.methods == (("galore.targets=[attention,mlp]", "~callbacks.samples"),)


def test_listed_methods_are_taken_with_each_of_the_swept() -> None:
    section = {
        "methods": ["optim=sgd update=whole", "adapter=lora"],
        "seeds": [4, 5],
        "tune": False,
    }
    grid = in_full(grid_of(["data.max_length=8,9"]), section)
    assert grid.methods == tuple(
        (f"data.max_length={length}", *method, "compare.methods=[]")
        for method in (("optim=sgd", "update=whole"), ("adapter=lora",))
        for length in (8, 9)
    )
    assert grid.swept == {"optim", "update", "adapter", "data.max_length"}
    assert grid.seeds == (4, 5) and not grid.tune
    assert in_full(grid_of(["seed=6"]), section).seeds == (6,)


def test_a_method_may_hold_quotation_marks() -> None:
    section = {"methods": ["""data.path='my rows.jsonl' """], "seeds": [0], "tune": True}
    [method] = in_full(grid_of([]), section).methods
    assert method[0] == "data.path=my rows.jsonl"
    section["methods"] = ["data.path='my"]
    with pytest.raises(ValueError, match="data.path='my: No closing quotation"):
        in_full(grid_of([]), section)


@pytest.mark.parametrize("setting", ["optim.lr=fast", "seed=0,one"])
def test_what_is_no_number_is_named(setting: str) -> None:
    with pytest.raises(ValueError, match="must be a number"):
        grid_of([setting])
