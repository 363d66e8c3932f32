"""One optimizer that is torch's Muon and torch's AdamW, bit for bit."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor
from torch.optim import AdamW, Muon
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoConfig, AutoModelForCausalLM

from lit_ft.optim import GroupRule, MuonAdamW, build_optimizer, narrowed, parameter_groups

SHAPES = {"embed": (50, 16), "up": (64, 16), "down": (16, 64), "idle": (8, 8), "norm": (16,)}
RULES = (
    GroupRule("no_decay", max_ndim=1, options={"weight_decay": 0.0}),
    GroupRule("embeddings", match="embed"),
    GroupRule("matrices", min_ndim=2, max_ndim=2, options={"use_muon": True}),
)


def parameters() -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator))
        for name, shape in SHAPES.items()
    }


def set_gradients(named: dict[str, torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for name, parameter in named.items():
        # An idle matrix has gradients so small that Muon's own eps, not AdamW's, decides its step.
        scale = 1e-9 if name == "idle" else 1.0
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


def ours(named: dict[str, torch.nn.Parameter], **options: Any) -> MuonAdamW:
    def factory(groups: Any) -> MuonAdamW:
        return MuonAdamW(groups, lr=1e-2, weight_decay=0.1, **options)

    optimizer = build_optimizer(factory, named.items(), RULES)
    assert isinstance(optimizer, MuonAdamW)
    return optimizer


def apart(named: dict[str, torch.nn.Parameter], fused: bool) -> tuple[Muon, AdamW]:
    """The two torch optimizers on the same split, set up by hand."""
    matrices = [named["up"], named["down"], named["idle"]]
    muon = Muon(matrices, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    groups = [
        {"params": [named["norm"]], "weight_decay": 0.0},
        {"params": [named["embed"]], "weight_decay": 0.1},
    ]
    return muon, AdamW(groups, lr=1e-2, fused=fused)


@pytest.mark.parametrize("fused", [False, True])
def test_weights_are_those_of_the_two_run_apart_through_schedule_and_reload(fused: bool) -> None:
    one, two = parameters(), parameters()
    optimizer = ours(one, fused=fused)
    scheduler = LambdaLR(optimizer, lambda step: 1 / (step + 1))
    separate = apart(two, fused)
    separate_schedulers = [LambdaLR(opt, lambda step: 1 / (step + 1)) for opt in separate]
    for step in range(6):
        if step == 3:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
        set_gradients(one, step)
        set_gradients(two, step)
        for each in (optimizer, scheduler, *separate, *separate_schedulers):
            each.step()
    for name in SHAPES:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=0)
    # One state for both kinds, under the names that torch gives.
    assert set(optimizer.state[one["up"]]) == {"momentum_buffer"}
    assert {"exp_avg", "exp_avg_sq"} <= set(optimizer.state[one["embed"]])


def test_options_of_a_group_reach_its_optimizer() -> None:
    def stepped(**options: Any) -> Tensor:
        named = parameters()
        groups = [
            {"params": [named["up"]], "use_muon": True},
            {"params": [named["embed"]], **options},
        ]
        optimizer = MuonAdamW(groups, lr=1e-2)
        for step in range(2):
            set_gradients(named, step)
            optimizer.step()
        return named["embed"].detach()

    assert not stepped(betas=(0.5, 0.5)).equal(stepped())


def test_closure_gradients_and_groups_added_later() -> None:
    named = parameters()
    optimizer = ours(named)
    late = torch.nn.Parameter(torch.randn(8, 8))
    optimizer.add_param_group({"params": [("late", late)], "use_muon": True, "lr": 0.5})
    everything = [*named.values(), late]
    before = [parameter.detach().clone() for parameter in everything]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.stack([parameter.square().sum() for parameter in everything]).sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.item() > 0
    assert not any(a.equal(b) for a, b in zip(everything, before, strict=True))
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in everything)


def test_a_narrowed_step_leaves_the_other_kind_alone() -> None:
    named = parameters()
    optimizer = ours(named)
    set_gradients(named, 0)
    with narrowed(optimizer, named["embed"]):
        optimizer.step()
    assert set(optimizer.state) == {named["embed"]}


def test_rates_are_those_of_adamw() -> None:
    """Matched to AdamW's root mean square: the first steps are of one size."""
    named = parameters()
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    optimizer = ours(named)
    set_gradients(named, 0)
    optimizer.param_groups[1]["weight_decay"] = optimizer.param_groups[2]["weight_decay"] = 0.0
    optimizer.step()
    sizes = {
        name: float((named[name].detach() - before[name]).square().mean().sqrt())
        for name in ("up", "down", "embed")
    }
    assert sizes["embed"] == pytest.approx(1e-2, rel=1e-3)
    for name in ("up", "down"):  # 0.2 of the rate: AdamW's update in the middle of training
        assert sizes[name] == pytest.approx(0.2e-2, rel=0.2)


def test_what_muon_cannot_take_is_refused_by_name() -> None:
    vector = torch.nn.Parameter(torch.zeros(3))
    optimizer = ours(parameters())
    with pytest.raises(ValueError, match=r"late has shape \(3,\).*max_ndim: 2"):
        optimizer.add_param_group({"params": [("late", vector)], "use_muon": True})
    assert len(optimizer.param_groups) == 3
    with pytest.raises(ValueError, match="No group uses Muon"):
        MuonAdamW([vector])


@pytest.mark.parametrize(
    ("family", "options", "embeddings", "stacked"),
    [
        ("llama", {"tie_word_embeddings": True}, {"model.embed_tokens.weight"}, set()),
        ("gpt2", {}, {"transformer.wte.weight", "transformer.wpe.weight"}, set()),
        ("gpt_neox", {}, {"gpt_neox.embed_in.weight", "lm_head.weight"}, set()),
        (
            "opt",
            {},
            {"model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"},
            set(),
        ),
        (
            "qwen3_moe",
            {"num_hidden_layers": 1},
            {"model.embed_tokens.weight", "lm_head.weight"},
            {
                "model.layers.0.mlp.experts.gate_up_proj",
                "model.layers.0.mlp.experts.down_proj",
            },
        ),
    ],
)
def test_the_configured_rules_know_the_model_families(
    family: str, options: dict[str, Any], embeddings: set[str], stacked: set[str]
) -> None:
    path = Path(__file__).parents[2] / "conf" / "optim" / "groups" / "muon_matrices.yaml"
    rules = instantiate(OmegaConf.load(path).groups, _convert_="all")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options))
    groups = parameter_groups(model.named_parameters(), rules)
    members = {group["name"]: {name for name, _ in group["params"]} for group in groups}
    assert members["embeddings"] == embeddings
    assert members.get("stacked", set()) == stacked
    assert all(parameter.ndim == 1 for _, parameter in groups[0]["params"])
    assert MuonAdamW(groups).param_groups[2]["use_muon"]
