"""Stepping inside backward is the ordinary step, to the bit, and keeps no large gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW, Optimizer, SparseAdam

from lit_ft.optim import stochastically_rounded
from lit_ft.optim.layerwise import LayerwiseStep, large_parameters
from tests.support.optimizers import OPTIMIZERS


class Net(nn.Module):
    """An embedding tied to the output, a layer used twice, a frozen one, one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(40, 96)
        self.twice = nn.Linear(96, 96)
        self.frozen = nn.Linear(96, 96).requires_grad_(False)
        self.unused = nn.Linear(96, 64)
        self.norm = nn.LayerNorm(96)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = self.norm(self.twice(self.frozen(self.twice(x).relu())))
        return nn.functional.cross_entropy(x.float() @ self.embedding.weight.float().T, ids.flip(0))


def build(
    factory: Callable[..., Optimizer], dtype: torch.dtype = torch.float32
) -> tuple[Net, Optimizer]:
    net = Net().to(dtype)
    held = list(net.parameters())  # the frozen ones too, as in AdamW(self.parameters())
    matrices = {"weight_decay": 0.1, "params": [p for p in held if p.ndim == 2]}
    if factory is OPTIMIZERS["muon"]:
        matrices["use_muon"] = True
    groups = [matrices, {"weight_decay": 0.0, "params": [p for p in held if p.ndim != 2]}]
    if factory is OPTIMIZERS["torch_muon"]:
        groups.pop()
    return net, stochastically_rounded(factory(groups), seed=0)


def train(
    net: Net,
    optimizer: Optimizer,
    *,
    backward: Callable[[Tensor], None] = Tensor.backward,
    clip: Callable[[list[Tensor]], object] = lambda _: None,
    micro_batches: int = 1,
    steps: int = 4,
) -> None:
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        batches = list(torch.randint(0, 40, (micro_batches, 12), generator=generator))

        @torch.enable_grad()  # transformers' Adafactor runs closures without, Lightning's are so
        def closure(last: Tensor = batches[-1]) -> Tensor:
            loss = net(last)
            backward(loss)
            clip([p for group in optimizer.param_groups for p in group["params"]])
            return loss

        for batch in batches[:-1]:
            net(batch).backward()
        optimizer.step(closure)
        optimizer.zero_grad()
        schedule.step()


def assert_same(net: Net, optimizer: Optimizer, other: Net, other_optimizer: Optimizer) -> None:
    torch.testing.assert_close(net.state_dict(), other.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(
        optimizer.state_dict()["state"], other_optimizer.state_dict()["state"], rtol=0, atol=0
    )


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_equals_the_ordinary_step(name: str, micro_batches: int) -> None:
    whole, whole_optimizer = build(OPTIMIZERS[name])
    net, optimizer = build(OPTIMIZERS[name])
    train(whole, whole_optimizer, micro_batches=micro_batches)
    LayerwiseStep(optimizer, large_parameters(optimizer, 0))
    train(net, optimizer, micro_batches=micro_batches)
    assert_same(net, optimizer, whole, whole_optimizer)


@pytest.mark.parametrize("name", ["adamw_fused", "adamw_8bit"])
def test_bfloat16_weights_are_rounded_as_in_the_ordinary_step(name: str) -> None:
    whole, whole_optimizer = build(OPTIMIZERS[name], torch.bfloat16)
    net, optimizer = build(OPTIMIZERS[name], torch.bfloat16)
    train(whole, whole_optimizer)
    LayerwiseStep(optimizer, large_parameters(optimizer, 0))
    train(net, optimizer)
    assert_same(net, optimizer, whole, whole_optimizer)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("min_grad_bytes", [0, 96 * 60 * 4])
def test_clipping_by_norm_is_exact(min_grad_bytes: int, micro_batches: int) -> None:
    norms, seen = [], []
    whole, whole_optimizer = build(OPTIMIZERS["adamw_fused"])
    net, optimizer = build(OPTIMIZERS["adamw_fused"])

    def clip(parameters: list[Tensor]) -> None:
        norms.append(nn.utils.clip_grad_norm_(parameters, 0.1))

    train(whole, whole_optimizer, clip=clip, micro_batches=micro_batches)
    assert all(norm > 0.2 for norm in norms)
    step = LayerwiseStep(optimizer, large_parameters(optimizer, min_grad_bytes), max_norm=0.1)

    def clip_if_it_did_not(parameters: list[Tensor]) -> None:
        seen.append(step.grad_norm if step.clips_now else nn.utils.clip_grad_norm_(parameters, 0.1))

    options = {"backward": step.backward, "clip": clip_if_it_did_not}
    train(net, optimizer, micro_batches=micro_batches, **options)
    assert seen == norms
    assert_same(net, optimizer, whole, whole_optimizer)


def test_clipping_by_value_is_exact() -> None:
    whole, whole_optimizer = build(OPTIMIZERS["sgd"])
    net, optimizer = build(OPTIMIZERS["sgd"])
    clip = partial(nn.utils.clip_grad_value_, clip_value=1e-3)
    train(whole, whole_optimizer, clip=clip)
    LayerwiseStep(optimizer, large_parameters(optimizer, 5_000), max_value=1e-3)
    train(net, optimizer, clip=clip)
    assert_same(net, optimizer, whole, whole_optimizer)


@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_no_two_large_gradients_are_alive_at_once(max_norm: float | None) -> None:
    net, optimizer = build(OPTIMIZERS["adamw_fused"])
    large = large_parameters(optimizer, 10_000)
    assert len(large) == 3
    alive: list[int] = []

    def count(_: Tensor) -> None:
        alive.append(sum(p.grad is not None for p in large))

    for parameter in large:
        parameter.register_post_accumulate_grad_hook(count)
    step = LayerwiseStep(optimizer, large, max_norm=max_norm)
    train(net, optimizer, backward=step.backward)
    assert set(alive) == {1}
    assert all(p.grad is None for p in large)


def test_a_group_is_stepped_when_all_of_it_have_their_gradients() -> None:
    layers = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(4)))
    optimizer = SGD(layers.parameters(), lr=0.1)
    first, second, third, fourth = layers.parameters()
    groups = [[second, third], [fourth, nn.Parameter()]]
    LayerwiseStep(optimizer, layers.parameters(), groups=groups)
    before = [p.detach().clone() for p in layers.parameters()]
    seen: dict[str, list[bool]] = {}

    def moved() -> list[bool]:
        return [not torch.equal(p, was) for p, was in zip(layers.parameters(), before, strict=True)]

    def closure() -> Tensor:
        hidden = torch.ones(1, 3)
        for name, layer in zip("abcd", layers, strict=True):
            hidden = layer(hidden)
            hidden.register_hook(lambda _, name=name: seen.update({name: moved()}))
        loss = hidden.sum()
        loss.backward()
        seen["after backward"] = moved()
        return loss

    optimizer.step(closure)
    # The gradient of a layer's output comes before that of its weight.
    assert seen["b"] == [False, False, False, False]
    assert seen["a"] == [False, True, True, False]
    assert seen["after backward"] == [True, True, True, False]
    assert moved() == [True] * 4  # the last waits for a gradient that never comes


def test_a_sparse_gradient_steps_too() -> None:
    nets = []
    for layerwise in (False, True):
        torch.manual_seed(0)
        net = nn.Embedding(30, 8, sparse=True)
        optimizer = SparseAdam(net.parameters())
        if layerwise:
            LayerwiseStep(optimizer, net.parameters())
        for _ in range(3):
            optimizer.zero_grad()
            optimizer.step(lambda net=net: net(torch.tensor([1, 4, 1])).square().sum().backward())
        nets.append(net.weight)
    assert torch.equal(*nets)


def test_hooks_and_schedulers_see_one_step() -> None:
    net, optimizer = build(OPTIMIZERS["adamw_fused"])
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append("step"))
    LayerwiseStep(optimizer, large_parameters(optimizer, 0))
    train(net, optimizer, steps=3)
    assert calls == ["step"] * 3
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.7**3 * 1e-2)


def test_removed_it_leaves_no_trace() -> None:
    whole, whole_optimizer = build(OPTIMIZERS["adamw"])
    net, optimizer = build(OPTIMIZERS["adamw"])
    LayerwiseStep(optimizer, large_parameters(optimizer, 0)).remove()
    train(whole, whole_optimizer)
    train(net, optimizer)
    assert_same(net, optimizer, whole, whole_optimizer)
    net(torch.arange(3)).backward()
    assert net.twice.weight.grad is not None


@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_a_gradient_that_comes_in_parts_is_refused(max_norm: float | None) -> None:
    layer = nn.Linear(4, 4)
    optimizer = AdamW(layer.parameters())
    step = LayerwiseStep(optimizer, layer.parameters(), max_norm=max_norm)

    def two_losses() -> None:
        for _ in range(2):
            step.backward(layer(torch.ones(2, 4)).square().sum())

    with pytest.raises(RuntimeError, match="comes in parts.*step after backward"):
        optimizer.step(two_losses)


def test_small_gradients_of_earlier_passes_are_kept_and_clipped() -> None:
    weights = []
    for layerwise in (False, True):
        torch.manual_seed(0)
        large, small = nn.Linear(8, 8, bias=False), nn.Linear(8, 1, bias=False)
        optimizer = AdamW([large.weight, small.weight], lr=0.1)
        step = LayerwiseStep(optimizer, [large.weight], max_norm=0.1) if layerwise else None
        x = torch.randn(4, 8)
        small(x).sum().backward()  # an earlier micro-batch, which large has no part in

        def closure(step=step, large=large, small=small, x=x) -> None:
            loss = small(large(x)).square().sum()
            step.backward(loss) if step else loss.backward()
            if not (step and step.clips_now):
                nn.utils.clip_grad_norm_([large.weight, small.weight], 0.1)

        optimizer.step(closure)
        weights.append([large.weight, small.weight])
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_a_norm_that_is_not_finite_stops_before_anything_moves() -> None:
    net, optimizer = build(OPTIMIZERS["adamw_fused"])
    before = {name: value.clone() for name, value in net.state_dict().items()}
    step = LayerwiseStep(optimizer, large_parameters(optimizer, 0), max_norm=1.0)
    with pytest.raises(FloatingPointError, match="not finite at step 1"):
        optimizer.step(lambda: step.backward(net(torch.arange(9)) * torch.inf))
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


def test_after_an_error_in_the_closure_backward_alone_moves_nothing() -> None:
    net, optimizer = build(OPTIMIZERS["adamw_fused"])
    LayerwiseStep(optimizer, large_parameters(optimizer, 0))

    def closure() -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        optimizer.step(closure)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net(torch.arange(9)).backward()
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


def test_an_optimizer_that_counts_in_its_groups_is_refused() -> None:
    class Counts(AdamW):
        def step(self, closure=None):
            for group in self.param_groups:
                group["steps"] = group.get("steps", 0) + 1
            return super().step(closure)

    layer = nn.Linear(4, 4)
    optimizer = Counts(layer.parameters())
    LayerwiseStep(optimizer, layer.parameters())
    with pytest.raises(RuntimeError, match="Counts counts in its groups \\('steps'\\)"):
        optimizer.step(lambda: layer(torch.ones(2, 4)).sum().backward())


def test_bitsandbytes_overrides_by_module_are_refused() -> None:
    net = nn.Sequential(bnb.nn.StableEmbedding(64, 128), nn.Linear(128, 64))  # 32-bit, and 8-bit
    optimizer = bnb.optim.AdamW8bit(net.parameters())
    LayerwiseStep(optimizer, net.parameters())
    try:
        with pytest.raises(ValueError, match="StableEmbedding.*after backward"):
            optimizer.step(lambda: net(torch.arange(9)).sum().backward())
    finally:
        bnb.optim.GlobalOptimManager.get_instance().initialize()


def test_an_optimizer_that_needs_all_gradients_is_refused() -> None:
    net = Net()
    with pytest.raises(ValueError, match="LBFGS looks at all gradients.*Leave LayerwiseUpdate out"):
        LayerwiseStep(LBFGS(net.parameters()), net.parameters())


def test_a_step_without_a_closure_is_the_ordinary_step() -> None:
    whole, whole_optimizer = build(partial(AdamW, lr=1e-2))
    net, optimizer = build(partial(AdamW, lr=1e-2))
    LayerwiseStep(optimizer, large_parameters(optimizer, 0))
    for each, its in ((whole, whole_optimizer), (net, optimizer)):
        for step in range(3):
            each(torch.arange(step, step + 9)).backward()
            its.step()
            its.zero_grad()
    assert_same(net, optimizer, whole, whole_optimizer)
