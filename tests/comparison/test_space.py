"""What a search draws from, out of the arguments of a sweep."""

from __future__ import annotations

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from lit_ft.comparison.space import settings_of, space_of


@pytest.mark.parametrize(
    ("typed", "drawn_from"),
    [
        ("interval(1e-5,1e-3)", FloatDistribution(1e-5, 1e-3)),
        ("tag(log,interval(1e-5,1e-3))", FloatDistribution(1e-5, 1e-3, log=True)),
        ("int(interval(1,5))", IntDistribution(1, 5)),
        ("range(20,60,20)", IntDistribution(20, 40, step=20)),
        ("range(0,1,0.5)", CategoricalDistribution(["0.0", "0.5"])),
        ("64,128", CategoricalDistribution(["64", "128"])),
        ("choice(adamw,sgd)", CategoricalDistribution(["adamw", "sgd"])),
        ("[a,b],[c]", CategoricalDistribution(["[a,b]", "[c]"])),
    ],
)
def test_each_form_of_a_sweep_is_a_distribution(typed, drawn_from):
    space = space_of(["optim=adamw", f"galore.rank={typed}"])
    assert space.fixed == ("optim=adamw",)
    assert space.distributions == {"galore.rank": drawn_from}


def test_the_corners_hold_each_choice_and_both_ends():
    space = space_of(["seed=1", "optim=adamw,sgd,muon", "optim.lr=interval(0.1,0.2)"])
    assert list(space.corners()) == [
        ["seed=1", "optim=adamw", "optim.lr=0.1"],
        ["seed=1", "optim=sgd", "optim.lr=0.2"],
        ["seed=1", "optim=muon", "optim.lr=0.2"],
    ]


def test_a_drawn_number_can_be_read():
    assert settings_of({"a": 0.000123456, "b": 3, "c": "x"}) == ["a=0.0001235", "b=3", "c=x"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["optim=adamw"], "Name what to search"),
        (["optim.lr=tag(log,interval(0,1))"], "optim.lr=tag"),
        (["optim.lr=interval(2,1)"], "optim.lr=interval"),
        (["galore.rank=range(3,3)"], "galore.rank=range"),
    ],
)
def test_what_cannot_be_drawn_is_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        space_of(arguments)
