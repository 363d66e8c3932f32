"""Stepping a few rows at a time is stepping all of them, with less room."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from lit_ft.compat.optimizers import traits_of
from lit_ft.optim import (
    Apollo,
    MuonAdamW,
    RowwiseAdamW8bit,
    Scale,
    SinkGD,
    row_chunked,
    stochastically_rounded,
)
from lit_ft.optim.adafactor import Adafactor, RelativeStepAdafactor
from lit_ft.subspace.moments import rotate_moments
from lit_ft.tensors import row_blocks as row_blocks
from tests.support.allocations import peak_allocated

EIGHT_BIT: dict[str, Callable[..., Optimizer]] = {
    "adamw": partial(bnb.optim.AdamW8bit, lr=1e-2, weight_decay=0.1),
    "lion": partial(bnb.optim.Lion8bit, lr=1e-3, weight_decay=0.1),
    "sgd": partial(bnb.optim.SGD8bit, lr=1e-2, momentum=0.9),
    "torchao": partial(RowwiseAdamW8bit, lr=1e-2, weight_decay=0.1),
}

ROUNDED: dict[str, Callable[..., Optimizer]] = {
    "adam": partial(Adam, lr=1e-2),
    "adamw_fused": partial(AdamW, lr=1e-2, fused=True),
    "adamw_foreach": partial(AdamW, lr=1e-2, foreach=True, amsgrad=True),
    "sgd": partial(SGD, lr=1e-2, momentum=0.9),
    "rmsprop": partial(RMSprop, lr=1e-2),
    "muon": partial(MuonAdamW, lr=1e-2),
    "adafactor": RelativeStepAdafactor,
    "adafactor_momentum": partial(
        Adafactor,
        lr=1e-2,
        relative_step=False,
        scale_parameter=False,
        beta1=0.9,
        weight_decay=0.1,
    ),
    "scale_rows": partial(Scale, lr=1e-2, momentum=0.9),
    "scale_columns": partial(Scale, lr=1e-2, dim=-2),
    "scale_columns_of_means": partial(Scale, lr=1e-2, momentum=0.9, dim=-2),
    "apollo_adamw": partial(Apollo, lr=1e-2),
    "apollo": partial(Apollo, lr=1e-2, rank=8),
    "sinkgd": partial(SinkGD, lr=1e-2),
    **{f"{name}_8bit": factory for name, factory in EIGHT_BIT.items()},
}
WHOLE = ("muon", "scale_columns_of_means", "apollo", "sinkgd")


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_blocks, "_ON_CPU", 8192)


def steps(factory: Callable[..., Optimizer], dtype: torch.dtype) -> tuple[Tensor, dict[str, Any]]:
    """Train a [300, 96] matrix beside a vector; return the matrix and its state."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.nn.Parameter(torch.randn(300, 96, generator=generator).to(dtype))
    vector = torch.nn.Parameter(torch.randn(300, generator=generator).to(dtype))
    groups: list[dict[str, Any]] = [{"params": [matrix]}, {"params": [vector]}]
    if getattr(factory, "func", None) is MuonAdamW:
        groups[0]["use_muon"] = True
    if factory is ROUNDED["apollo_adamw"]:
        groups[0]["use_adamw"] = True
    optimizer = row_chunked(stochastically_rounded(factory(groups), seed=0))
    for step in range(4):
        if step == 2:  # as a resumed run does
            optimizer.load_state_dict(optimizer.state_dict())
        for parameter in (matrix, vector):
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
        optimizer.step()
    return matrix.detach(), optimizer.state[matrix]


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_pieces_change_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, state = steps(EIGHT_BIT[name], torch.float32)
    monkeypatch.setattr(row_blocks, "_ON_CPU", 8192)
    in_pieces, its_state = steps(EIGHT_BIT[name], torch.float32)
    torch.testing.assert_close(in_pieces, weight, rtol=0, atol=0)
    torch.testing.assert_close(its_state, state, rtol=0, atol=0)


@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_steps_in_pieces_keep_the_state(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, state = steps(ROUNDED[name], torch.bfloat16)
    monkeypatch.setattr(row_blocks, "_ON_CPU", 8192)
    in_pieces, its_state = steps(ROUNDED[name], torch.bfloat16)
    assert its_state.keys() == state.keys()
    assert its_state["times_rounded"] == 4
    if name in WHOLE:  # they look at the whole matrix, so it is one piece
        torch.testing.assert_close(in_pieces, weight, rtol=0, atol=0)
    # Other random bits, the same expectation: weights differ by a bfloat16 step a rounding.
    torch.testing.assert_close(in_pieces, weight, rtol=4 * 2**-7, atol=2**-6)
    for key, value in state.items():
        if key == "RMS":  # of those weights
            torch.testing.assert_close(its_state[key], value, rtol=2**-8, atol=0)
        elif isinstance(value, Tensor) and value.dtype is torch.float32 and "absmax" not in key:
            # Fused and vectorised kernels may contract a multiplication at another place.
            torch.testing.assert_close(its_state[key], value, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("small_pieces")
def test_each_piece_draws_its_own_bits() -> None:
    weight = torch.nn.Parameter(torch.ones(256, 64, dtype=torch.bfloat16))
    optimizer = stochastically_rounded(SGD([weight], lr=1.0), seed=0)
    weight.grad = torch.full_like(weight, 2**-9)
    optimizer.step()
    first, second = weight.detach().split(128)
    assert 0.3 < (first != 1).float().mean() < 0.7
    assert not first.equal(second)


def test_an_8_bit_step_takes_the_room_of_a_piece() -> None:
    def peak(prepare: Callable[[Optimizer], Optimizer]) -> int:
        weight = torch.nn.Parameter(torch.ones(8192, 1024))
        optimizer = prepare(bnb.optim.AdamW8bit([weight]))
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        return peak_allocated(optimizer.step)

    size = 4 * 8192 * 1024
    assert peak(lambda optimizer: optimizer) > 4 * size
    assert peak(row_chunked) < size


@pytest.mark.usefixtures("small_pieces")
def test_columns_are_normalised_over_the_rows_of_all_pieces() -> None:
    weight = torch.nn.Parameter(torch.zeros(1024, 256, dtype=torch.bfloat16))
    optimizer = stochastically_rounded(Scale([weight], lr=1.0, dim=-2), seed=0)
    weight.grad = torch.ones_like(weight)
    weight.grad[:512] = 3
    optimizer.step()
    size = 5**0.5  # the root mean square of 3 and 1
    for rows, gradient in (weight[:512], 3.0), (weight[512:], 1.0):
        expected = torch.full_like(rows, -gradient / size)
        torch.testing.assert_close(rows.detach(), expected, rtol=2**-7, atol=0)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("factory", [partial(Scale, dim=-2), Scale, RelativeStepAdafactor])
def test_large_sparse_gradients_are_refused_by_name(factory: Callable[..., Optimizer]) -> None:
    embedding = torch.nn.Embedding(1024, 256, sparse=True, dtype=torch.bfloat16)
    optimizer = stochastically_rounded(factory(embedding.parameters()), seed=0)
    embedding(torch.arange(4)).sum().backward()
    with pytest.raises(RuntimeError, match="build embeddings with sparse=False"):
        optimizer.step()


@pytest.mark.usefixtures("small_pieces")
def test_adafactors_step_takes_the_room_of_a_piece() -> None:
    weight = torch.nn.Parameter(torch.ones(1024, 256, dtype=torch.bfloat16))
    optimizer = stochastically_rounded(RelativeStepAdafactor([weight]), seed=0)
    weight.grad = torch.ones_like(weight)
    assert peak_allocated(optimizer.step) < 1.5 * weight.numel()


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(
    ("options", "state_bytes"),
    [({"dim": -1}, 0), ({"dim": -2}, 0), ({"momentum": 0.9}, 4), ({"use_adamw": True}, 8)],
)
def test_a_first_step_takes_the_room_of_its_state_and_a_piece(
    options: dict, state_bytes: int
) -> None:
    weight = torch.nn.Parameter(torch.ones(1024, 256, dtype=torch.bfloat16))
    optimizer = stochastically_rounded(Scale([{"params": [weight], **options}]), seed=0)
    weight.grad = torch.ones_like(weight)
    assert peak_allocated(optimizer.step) < (1.5 + state_bytes) * weight.numel()


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchaos_step_takes_the_room_of_a_piece(dtype: torch.dtype) -> None:
    weight = torch.nn.Parameter(torch.ones(1024, 256, dtype=dtype))
    optimizer = stochastically_rounded(RowwiseAdamW8bit([weight]), seed=0)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert peak_allocated(optimizer.step) < 4 * weight.numel()


def test_moments_turn_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    rotation = torch.linalg.qr(torch.randn(64, 64)).Q

    def turned(state: dict[str, Any], kind: type[Optimizer]) -> dict[str, Any]:
        state = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
        moments = traits_of(kind).moments
        assert rotate_moments(state, {"betas": (0.9, 0.95)}, rotation, moments=moments)
        return state

    for name, factory in {
        "exp_avg": AdamW,
        "state1": bnb.optim.AdamW8bit,
        "exp_avg_scale": RowwiseAdamW8bit,
    }.items():
        matrix = torch.nn.Parameter(torch.randn(1000, 64))
        optimizer = factory([matrix])
        matrix.grad = torch.randn_like(matrix)
        optimizer.step()
        monkeypatch.undo()
        whole = turned(optimizer.state[matrix], type(optimizer))
        monkeypatch.setattr(row_blocks, "_ON_CPU", 8192)
        pieces = turned(optimizer.state[matrix], type(optimizer))
        assert not whole[name].equal(optimizer.state[matrix][name])
        for key, value in whole.items():
            if isinstance(value, Tensor) and value.dtype is torch.uint8:  # codes, ±1 at a border
                assert (pieces[key].int() - value.int()).abs().max() <= 1
            else:
                torch.testing.assert_close(pieces[key], value, rtol=1e-4, atol=1e-7)


def test_what_needs_no_pieces_stays_what_it_is() -> None:
    large = [torch.nn.Parameter(torch.ones(2048, 1024))]
    assert type(row_chunked(AdamW(large))) is AdamW
    small = [torch.nn.Parameter(torch.ones(64, 64))]
    assert type(row_chunked(bnb.optim.AdamW8bit(small))) is bnb.optim.AdamW8bit
    assert type(row_chunked(bnb.optim.LAMB8bit(large))) is bnb.optim.LAMB8bit
    paged = bnb.optim.PagedAdamW8bit  # its state stays where bitsandbytes has put it
    assert type(row_chunked(paged(large))) is paged
