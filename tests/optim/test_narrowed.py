"""Stepping parameter by parameter is the whole step, to the bit, for every optimizer we ship."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.optim import Optimizer

from lit_ft.optim import narrowed
from tests.support.optimizers import OPTIMIZERS

SHAPES = {"matrix": (96, 64), "tall": (130, 40), "norm": (64,), "small": (3, 5)}


def build(factory: Callable[..., Optimizer]) -> tuple[dict[str, torch.nn.Parameter], Optimizer]:
    generator = torch.Generator().manual_seed(0)
    named = {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator))
        for name, shape in SHAPES.items()
        if not (factory is OPTIMIZERS["torch_muon"] and len(shape) == 1)
    }
    matrices = {"weight_decay": 0.1, "params": [p for p in named.values() if p.ndim == 2]}
    if factory is OPTIMIZERS["muon"]:
        matrices["use_muon"] = True
    rest = {"weight_decay": 0.0, "params": [p for p in named.values() if p.ndim != 2]}
    return named, factory([matrices, rest] if rest["params"] else [matrices])


def set_gradients(parameters: dict[str, torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_narrowed_steps_are_the_whole_step(name: str) -> None:
    whole, whole_optimizer = build(OPTIMIZERS[name])
    parts, parts_optimizer = build(OPTIMIZERS[name])
    for step in range(3):
        set_gradients(whole, step)
        set_gradients(parts, step)
        whole_optimizer.step()
        for parameter in reversed(parts.values()):  # the order in which backward brings them
            with narrowed(parts_optimizer, parameter):
                parts_optimizer.step()
    for key in whole:
        torch.testing.assert_close(parts[key], whole[key], rtol=0, atol=0)
        torch.testing.assert_close(
            parts_optimizer.state[parts[key]], whole_optimizer.state[whole[key]], rtol=0, atol=0
        )


def test_only_the_given_parameters_move() -> None:
    parameters, optimizer = build(OPTIMIZERS["adamw_fused"])
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    set_gradients(parameters, 0)
    with narrowed(optimizer, parameters["norm"], parameters["tall"]):
        optimizer.step()
    moved = {name for name in parameters if not parameters[name].equal(before[name])}
    assert moved == {"norm", "tall"}
    with narrowed(optimizer):
        optimizer.step()
    assert set(optimizer.state) == {parameters["norm"], parameters["tall"]}


def test_groups_come_back_whole_even_after_an_error() -> None:
    parameters, optimizer = build(OPTIMIZERS["sgd"])
    before = [dict(group, params=list(group["params"])) for group in optimizer.param_groups]
    with pytest.raises(RuntimeError, match="stop"), narrowed(optimizer, parameters["norm"]):
        raise RuntimeError("stop")
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [
        [id(p) for p in group["params"]] for group in before
    ]


def test_options_set_inside_the_block_stay() -> None:
    parameters, optimizer = build(OPTIMIZERS["sgd"])
    with narrowed(optimizer, parameters["norm"]):
        optimizer.param_groups[0]["lr"] = 0.5
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_a_parameter_of_another_model_is_refused() -> None:
    _, optimizer = build(OPTIMIZERS["sgd"])
    stranger = torch.nn.Parameter(torch.zeros(7, 9))
    with (
        pytest.raises(ValueError, match=r"SGD does not hold .*\(7, 9\)"),
        narrowed(optimizer, stranger),
    ):
        pass
