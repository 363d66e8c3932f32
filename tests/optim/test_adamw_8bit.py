"""AdamW in 8 bits a moment: close to AdamW, block by block as torchao has it, saved as it is."""

from __future__ import annotations

import io
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torchao.optim import AdamW8bit

from lit_ft.optim import RowwiseAdamW8bit
from lit_ft.optim.adamw_8bit import _update
from lit_ft.tensors.quantized_state import zeros_8bit


def seeded(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def steps(optimizer: Optimizer, weight: Tensor, numbers: range) -> None:
    for number in numbers:
        weight.grad = seeded(weight.shape, number).to(weight.dtype)
        optimizer.step()


@settings(max_examples=60)
@given(shape=st.lists(st.integers(1, 700), min_size=1, max_size=3))
def test_blocks_end_with_their_rows(shape: list[int]) -> None:
    weight = torch.empty(shape, device="meta")
    state = zeros_8bit("exp_avg", weight)
    block = next(size for size in range(min(256, shape[-1]), 0, -1) if shape[-1] % size == 0)
    if len(shape) == 1 or weight.numel() < 4096 or block < 16:
        assert list(state) == ["exp_avg"]
        assert state["exp_avg"].dtype is torch.float32
    else:
        assert state["exp_avg"].dtype is torch.uint8
        assert state["exp_avg_scale"].shape == (*shape[:-1], shape[-1] // block)
    assert state["exp_avg"].shape == weight.shape


def test_where_blocks_are_the_same_it_is_torchaos() -> None:
    weights = []
    for kind in (RowwiseAdamW8bit, AdamW8bit):
        weight = nn.Parameter(seeded((32, 512), 0))  # two blocks of 256 in each row
        with torch.compiler.set_stance("force_eager"):  # torchao's always compiles
            steps(kind([weight], lr=1e-2, weight_decay=0.1), weight, range(5))
        weights.append(weight)
    torch.testing.assert_close(*weights, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(64, 96), (20, 16, 24), (64,), (), (4096, 7)])
def test_it_is_near_adamw(shape: tuple[int, ...]) -> None:
    weights = []
    for kind in (RowwiseAdamW8bit, AdamW):
        weight = nn.Parameter(seeded(shape, 0))
        steps(kind([weight], lr=1e-2, weight_decay=0.1), weight, range(5))
        weights.append(weight)
    quantised, exact = ((weight - seeded(shape, 0)).detach() for weight in weights)
    in_float = len(shape) < 2 or shape[-1] == 7
    tolerance = 1e-6 if in_float else 0.05 * exact.abs().mean()
    assert (quantised - exact).abs().mean() < tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_resume_equals_never_having_stopped(dtype: torch.dtype) -> None:
    straight, stopped = (nn.Parameter(seeded((64, 96), 0).to(dtype)) for _ in range(2))
    steps(RowwiseAdamW8bit([straight]), straight, range(6))
    first = RowwiseAdamW8bit([stopped])
    steps(first, stopped, range(3))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = RowwiseAdamW8bit([stopped])
    resumed.load_state_dict(torch.load(file, weights_only=True))
    kinds = {value.dtype for value in resumed.state[stopped].values()}
    assert kinds == {torch.uint8, torch.float32}  # whatever the weights are
    steps(resumed, stopped, range(3, 6))
    assert stopped.equal(straight)


def test_saved_state_is_plain_tensors() -> None:
    # Whoever reads a checkpoint, to chat or to export, need not have torchao.
    weight = nn.Parameter(seeded((64, 96), 0))
    optimizer = RowwiseAdamW8bit([weight])
    steps(optimizer, weight, range(1))
    assert {type(value) for value in optimizer.state_dict()["state"][0].values()} == {Tensor}


def test_a_missing_torchao_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim.adam", None)
    _update.cache_clear()
    with pytest.raises(ModuleNotFoundError, match="pip install torchao"):
        RowwiseAdamW8bit([nn.Parameter(torch.ones(2))])


@pytest.mark.parametrize(
    "options", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"betas": (-0.1, 0.9)}, {"eps": -1e-8}]
)
def test_options_out_of_range_are_named(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        RowwiseAdamW8bit([nn.Parameter(torch.ones(2))], **options)


@pytest.mark.slow  # a C++ compiler runs
def test_compiled_it_is_the_same_and_a_new_rate_compiles_nothing() -> None:
    weights = []
    for compiled in (True, False):
        weight = nn.Parameter(seeded((64, 96), 0))
        optimizer = RowwiseAdamW8bit([weight], compiled=compiled)
        steps(optimizer, weight, range(2))
        with torch.compiler.set_stance("fail_on_recompile"):
            for number in range(2, 5):
                optimizer.param_groups[0]["lr"] /= 2
                steps(optimizer, weight, range(number, number + 1))
        weights.append(weight)
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)
