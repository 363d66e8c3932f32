"""Every trainable parameter is in exactly one group, and the group's options arrive."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch.optim import SGD, AdamW, Rprop
from transformers.optimization import Adafactor

from lit_ft.optim import DECAY_MATRICES, GroupRule, build_optimizer, parameter_groups


class TiedModel(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(7, 4)
        self.proj = torch.nn.Linear(4, 4)
        self.norm = torch.nn.LayerNorm(4)
        self.lm_head = torch.nn.Linear(4, 7, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        self.frozen = torch.nn.Linear(4, 4).requires_grad_(False)


def names(groups: list[dict[str, Any]]) -> dict[str, list[str]]:
    return {group["name"]: [name for name, _ in group["params"]] for group in groups}


def test_default_rules_decay_matrices_only() -> None:
    groups = parameter_groups(TiedModel().named_parameters())
    assert names(groups) == {
        "no_decay": ["proj.bias", "norm.weight", "norm.bias"],
        "decay": ["embed_tokens.weight", "proj.weight"],
    }
    assert groups[0]["weight_decay"] == 0.0
    assert "weight_decay" not in groups[1]


@pytest.mark.parametrize(
    "factory",
    [
        partial(AdamW, lr=0.1, weight_decay=0.5, fused=True),
        partial(SGD, lr=0.1, weight_decay=0.5),
        partial(bnb.optim.AdamW8bit, lr=0.1, weight_decay=0.5),
        partial(bnb.optim.Lion8bit, lr=0.1, weight_decay=0.5),
        partial(Adafactor, lr=0.1, weight_decay=0.5, relative_step=False, scale_parameter=False),
    ],
    ids=["adamw", "sgd", "adamw_8bit", "lion_8bit", "adafactor"],
)
def test_decay_shrinks_matrices_and_leaves_vectors(factory: Any) -> None:
    model = TiedModel()
    torch.nn.init.ones_(model.proj.bias)
    optimizer = build_optimizer(factory, model.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)  # what moves, moves by decay
    optimizer.step()
    for name, parameter in model.named_parameters():
        expected = before[name] * (0.95 if name in ("embed_tokens.weight", "proj.weight") else 1)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-7)


def test_torch_keeps_names_in_the_optimizer_and_its_checkpoint() -> None:
    optimizer = build_optimizer(AdamW, TiedModel().named_parameters())
    saved = optimizer.state_dict()["param_groups"]
    for group in (optimizer.param_groups[1], saved[1]):
        assert group["name"] == "decay"
        assert group["param_names"] == ["embed_tokens.weight", "proj.weight"]


def test_tied_parameters_count_once_under_whatever_names_they_come() -> None:
    model = TiedModel()
    every_name = model.named_parameters(remove_duplicate=False)
    groups = parameter_groups(every_name)
    assert names(groups)["decay"] == ["embed_tokens.weight", "proj.weight"]


@given(
    st.lists(st.sampled_from(["proj", "norm", "embed", r"\.weight$", "bias", "^p"]), max_size=4),
    st.integers(0, 2),
)
def test_the_first_rule_that_matches_takes_the_parameter(
    patterns: list[str], min_ndim: int
) -> None:
    rules = [
        GroupRule(str(index), match=pattern, min_ndim=min_ndim, required=False)
        for index, pattern in enumerate(patterns)
    ]
    rules.append(GroupRule("rest", required=False))
    model = TiedModel()
    taken = [
        name
        for members in names(parameter_groups(model.named_parameters(), rules)).values()
        for name in members
    ]
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sorted(taken) == sorted(trainable)
    for group in parameter_groups(model.named_parameters(), rules):
        for name, parameter in group["params"]:
            first = next(rule for rule in rules if rule.takes(name, parameter))
            assert first.name == group["name"]


def test_the_configured_rules_are_the_default_ones() -> None:
    groups = Path(__file__).parents[2] / "conf" / "optim" / "groups"
    configured = OmegaConf.load(groups / "decay_matrices.yaml").groups
    assert instantiate(configured, _convert_="all") == list(DECAY_MATRICES)


def test_a_lora_model_has_no_vectors_and_needs_none() -> None:
    adapter = {"lora_A.weight": torch.nn.Parameter(torch.zeros(2, 4))}
    assert names(parameter_groups(adapter.items())) == {"decay": ["lora_A.weight"]}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [GroupRule("head", match="lm_heat"), *DECAY_MATRICES],
            r"'head' takes no parameter: nothing matches 'lm_heat' .*closest are .*proj.weight"
            ".*required: false",
        ),
        (
            [*DECAY_MATRICES, GroupRule("embeddings", match="embed")],
            "'embeddings' takes no parameter: earlier rules take all .*put it before",
        ),
        (
            [GroupRule("matrices", min_ndim=2)],
            r"No group rule takes proj.bias \(4,\), norm.weight \(4,\), norm.bias \(4,\) "
            r"\(rules: matrices\)",
        ),
        ([GroupRule("same"), GroupRule("same")], "differ in name"),
    ],
    ids=["nothing", "shadowed", "uncovered", "same_name"],
)
def test_rules_that_do_not_fit_the_model_are_refused(rules: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parameter_groups(TiedModel().named_parameters(), rules)


def test_a_frozen_model_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        parameter_groups(TiedModel().requires_grad_(False).named_parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"match": "(["}, r"'r': match='\(\[' is not a regular expression"),
        ({"min_ndim": 2, "max_ndim": 1}, "'r': max_ndim=1 is less than min_ndim=2"),
        ({"options": {"name": "x", "params": []}}, "'r': name, params cannot be an option"),
    ],
)
def test_a_rule_that_means_nothing_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroupRule("r", **options)


def test_an_option_that_the_optimizer_lacks_is_refused() -> None:
    rules = [GroupRule("all", options={"weight_decay": 0.1})]
    with pytest.raises(ValueError, match="'all' sets weight_decay=0.1, which Rprop does not have"):
        build_optimizer(Rprop, TiedModel().named_parameters(), rules)
    # No decay is what Rprop does anyway.
    assert len(build_optimizer(Rprop, TiedModel().named_parameters()).param_groups) == 2


def test_a_rule_may_match_any_name_of_a_tied_weight() -> None:
    rules = [GroupRule("head", match="lm_head"), GroupRule("rest")]
    named = TiedModel().named_parameters(remove_duplicate=False)
    assert names(parameter_groups(named, rules))["head"] == ["embed_tokens.weight"]
    with pytest.raises(ValueError, match="'head' takes no parameter"):
        parameter_groups(TiedModel().named_parameters(), rules)
