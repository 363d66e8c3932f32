"""Optimizers whose bfloat16 weights learn as float32 ones do, and resume to the bit."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from transformers import get_constant_schedule_with_warmup

from lit_ft.optim import (
    Apollo,
    MuonAdamW,
    RowwiseAdamW8bit,
    Scale,
    SinkGD,
    WarmupSchedule,
    narrowed,
    stochastically_rounded,
)
from lit_ft.optim.adafactor import RelativeStepAdafactor
from tests.support.seeded import seeded

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": partial(AdamW, lr=1e-2),
    "adamw_fused": partial(AdamW, lr=1e-2, fused=True),
    "sgd": partial(SGD, lr=1e-2, momentum=0.9),
    "muon": partial(MuonAdamW, lr=1e-2),
    "adafactor": RelativeStepAdafactor,
    "adamw_8bit": partial(bnb.optim.AdamW8bit, lr=1e-2),
    "adamw_8bit_torchao": partial(RowwiseAdamW8bit, lr=1e-2),
    "lion_8bit": partial(bnb.optim.Lion8bit, lr=1e-2),
    "scale": partial(Scale, lr=1e-2, momentum=0.9),
    "apollo": partial(Apollo, lr=1e-2, rank=8, refresh_every=2),
    "sinkgd": partial(SinkGD, lr=1e-2),
}


def build(name: str, dtype: torch.dtype = torch.bfloat16) -> tuple[list[Tensor], Optimizer]:
    """Return a bfloat16 matrix and vector beside a float32 vector, and their plain optimizer."""
    matrix = torch.nn.Parameter(torch.randn(96, 64, generator=seeded(0)).to(dtype))
    norm = torch.nn.Parameter(torch.ones(64, dtype=dtype))
    router = torch.nn.Parameter(torch.ones(64))
    groups: list[dict[str, Any]] = [
        {"params": [("matrix", matrix)]},
        {"params": [("norm", norm), ("router", router)], "weight_decay": 0.0},
    ]
    if name == "muon":
        groups[0]["use_muon"] = True
    return [matrix, norm, router], OPTIMIZERS[name](groups)


def set_gradients(parameters: list[Tensor], step: int) -> None:
    generator = seeded(step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def test_norm_weights_at_one_move_as_in_float32() -> None:
    def train(dtype: torch.dtype, rounded: bool) -> Tensor:
        norm = torch.nn.Parameter(torch.ones(4096, dtype=dtype))
        optimizer = AdamW([norm], lr=1e-4, weight_decay=0.0)
        if rounded:
            stochastically_rounded(optimizer, seed=0)
        for step in range(20):
            noise = torch.randn(norm.shape, generator=seeded(step))
            norm.grad = (1 + 0.1 * noise).to(dtype)
            optimizer.step()
        return norm.detach().float()

    exact = train(torch.float32, rounded=False)
    assert train(torch.bfloat16, rounded=False).equal(torch.ones(4096))  # the defect
    moved = 1 - train(torch.bfloat16, rounded=True).mean()
    assert exact.mean() == pytest.approx(1 - 20e-4, abs=1e-4)
    # Below 1 neighbours are 2^-8 apart: a standard error of about 2^-8 · 0.5 / √4096 on 2e-3.
    assert moved == pytest.approx(float(1 - exact.mean()), abs=4 * 2**-9 / 64)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_float32_parameters_take_the_plain_step(name: str) -> None:
    plain, optimizer = build(name)
    ours, rounded = build(name)
    assert stochastically_rounded(rounded, seed=0) is rounded
    for step in range(3):
        for parameters, opt in ((plain, optimizer), (ours, rounded)):
            set_gradients(parameters, step)
            opt.step()
    torch.testing.assert_close(ours[2], plain[2], rtol=0, atol=0)
    assert not ours[0].equal(plain[0])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_step_is_the_float32_step_rounded(name: str) -> None:
    exact, optimizer = build(name, torch.float32)
    ours, rounded = build(name)
    with torch.no_grad():
        exact[0].copy_(ours[0])
    stochastically_rounded(rounded, seed=0)
    set_gradients(ours, 1)
    for theirs, parameter in zip(exact, ours, strict=True):
        assert parameter.grad is not None
        theirs.grad = parameter.grad.float()
    optimizer.step()
    rounded.step()
    for theirs, parameter in zip(exact[:2], ours[:2], strict=True):
        cut_off = (theirs.detach().view(torch.int32) & -(1 << 16)).view(torch.float32)
        away = ((theirs.detach().view(torch.int32) | 0xFFFF) + 1).view(torch.float32)
        assert ((parameter == cut_off) | (parameter == away)).all()
        state = {k: v for k, v in rounded.state[parameter].items() if k != "times_rounded"}
        torch.testing.assert_close(state, optimizer.state[theirs], rtol=0, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resume_repeats_the_uninterrupted_run(name: str) -> None:
    whole, optimizer = build(name)
    stochastically_rounded(optimizer, seed=7)
    for step in range(6):
        if step == 3:
            file = io.BytesIO()
            torch.save((optimizer.state_dict(), [p.detach() for p in whole]), file)
        set_gradients(whole, step)
        optimizer.step()

    resumed, optimizer_again = build(name)
    stochastically_rounded(optimizer_again, seed=7)
    file.seek(0)
    state, weights = torch.load(file, weights_only=True)
    with torch.no_grad():
        for parameter, weight in zip(resumed, weights, strict=True):
            parameter.copy_(weight)
    optimizer_again.load_state_dict(state)
    for step in range(3, 6):
        set_gradients(resumed, step)
        optimizer_again.step()
    for ours, theirs in zip(resumed, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        torch.testing.assert_close(
            optimizer_again.state[ours], optimizer.state[theirs], rtol=0, atol=0
        )
    assert optimizer_again.state[resumed[0]]["times_rounded"] == 6


def test_moments_are_float32_and_stay_so_through_a_load() -> None:
    parameters, optimizer = build("adamw")
    stochastically_rounded(optimizer, seed=0)
    set_gradients(parameters, 0)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert {v.dtype for p in parameters for k, v in optimizer.state[p].items() if "exp" in k} == {
        torch.float32
    }
    assert [p for group in optimizer.param_groups for p in group["params"]] == parameters


def test_a_load_that_fails_leaves_the_optimizer_as_it_was() -> None:
    parameters, optimizer = build("adamw")
    stochastically_rounded(optimizer, seed=0)
    set_gradients(parameters, 0)
    optimizer.step()
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})
    assert set(optimizer.state) == set(parameters)
    assert [p for group in optimizer.param_groups for p in group["params"]] == parameters


def test_layerwise_steps_are_the_whole_step() -> None:
    whole, whole_optimizer = build("adamw_fused")
    parts, parts_optimizer = build("adamw_fused")
    for optimizer in (whole_optimizer, parts_optimizer):
        stochastically_rounded(optimizer, seed=0)
    for step in range(3):
        set_gradients(whole, step)
        set_gradients(parts, step)
        whole_optimizer.step()
        for parameter in reversed(parts):
            with narrowed(parts_optimizer, parameter):
                parts_optimizer.step()
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)


def test_the_seed_the_step_and_the_position_choose_the_bits() -> None:
    def run(seed: int, steps: int) -> list[Tensor]:
        parameters = [torch.nn.Parameter(torch.ones(512, dtype=torch.bfloat16)) for _ in range(2)]
        optimizer = stochastically_rounded(SGD(parameters, lr=1e-3), seed=seed)
        for _ in range(steps):
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
                if steps > 1:
                    parameter.data.fill_(1)
            optimizer.step()
        return [parameter.detach() for parameter in parameters]

    first, other = run(0, 1)
    assert not first.equal(other)
    assert first.equal(run(0, 1)[0])
    assert not first.equal(run(1, 1)[0])
    assert not first.equal(run(0, 2)[0])


def test_hooks_and_closure_run_once_a_step() -> None:
    parameters, optimizer = build("adamw")
    stochastically_rounded(optimizer, seed=0)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure() -> Tensor:
        calls.append("closure")
        loss = torch.stack([parameter.float().square().sum() for parameter in parameters]).sum()
        loss.backward()
        return loss

    before = [parameter.detach().clone() for parameter in parameters]
    loss = optimizer.step(closure)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert loss.item() > 0
    assert calls == ["before", "closure", "after", "before", "after"]
    assert not any(a.equal(b) for a, b in zip(parameters, before, strict=True))


def test_gradient_accumulator_hooks_survive() -> None:
    """DDP reduces gradients in such hooks: losing one lets replicas drift apart silently."""
    parameters, optimizer = build("adamw")
    stochastically_rounded(optimizer, seed=0)
    norm = parameters[1]
    reduced: list[int] = []
    accumulator = norm.expand_as(norm).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    accumulator.register_hook(lambda *_: reduced.append(1))
    for backward in range(1, 4):
        norm.float().sum().backward()
        assert len(reduced) == backward
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())


def test_a_group_added_later_is_rounded_too() -> None:
    _, optimizer = build("adamw")
    stochastically_rounded(optimizer, seed=0)
    late = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizer.add_param_group({"params": [("late", late)], "lr": 1e-4, "weight_decay": 0.0})
    late.grad = torch.ones_like(late)
    optimizer.step()
    assert 0 < (late < 1).float().mean() < 0.5


def test_float16_and_late_wrapping_are_refused() -> None:
    half = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    with pytest.raises(ValueError, match='float16 .* Use precision="bf16-true"'):
        stochastically_rounded(SGD([half], lr=1.0), seed=0)
    _, optimizer = build("adamw")
    stochastically_rounded(optimizer, seed=0)
    with pytest.raises(ValueError, match="float16"):
        optimizer.add_param_group({"params": [("half", half)]})
    assert len(optimizer.param_groups) == 2
    _, optimizer = build("adamw")
    WarmupSchedule(get_constant_schedule_with_warmup, 0)(optimizer, 5)
    with pytest.raises(ValueError, match="before building the scheduler"):
        stochastically_rounded(optimizer, seed=0)


def test_a_float32_model_keeps_its_optimizer_as_it_is() -> None:
    optimizer = AdamW([torch.nn.Parameter(torch.ones(3))])
    assert type(stochastically_rounded(optimizer, seed=0)) is AdamW
