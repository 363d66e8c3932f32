"""The original package's optimizers: unchanged in what they do, and resumable."""

from __future__ import annotations

import io
from typing import Any

import galore_torch
import pytest
import torch
from torch import nn

from lit_ft.measure import optimizer_state_bytes
from lit_ft.optim.galore_torch import GaLoreTorchAdafactor, GaLoreTorchAdamW

SETTINGS = {"rank": 2, "update_proj_gap": 3, "scale": 0.5, "proj_type": "std"}
OURS = (GaLoreTorchAdamW, GaLoreTorchAdafactor)


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator)) for s in ((8, 6), (5, 9), (6,))]


def built(kind: Any, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    matrices, vectors = params[:2], params[2:]
    groups = [{"params": matrices, "galore": True}, {"params": vectors}]
    optimizer: torch.optim.Optimizer = kind(groups, lr=0.01, **SETTINGS)
    return optimizer


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in params:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize(
    ("ours", "upstream", "options"),
    [
        (GaLoreTorchAdamW, galore_torch.GaLoreAdamW, {"no_deprecation_warning": True}),
        (
            GaLoreTorchAdafactor,
            galore_torch.GaLoreAdafactor,
            {"scale_parameter": False, "relative_step": False},
        ),
    ],
)
def test_weights_are_those_of_upstream(ours: Any, upstream: Any, options: dict[str, Any]) -> None:
    mine, theirs = parameters(), parameters()
    train(built(ours, mine), mine, range(7))
    groups = [{"params": theirs[:2], **SETTINGS}, {"params": theirs[2:]}]
    train(upstream(groups, lr=0.01, **options), theirs, range(7))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("kind", OURS)
def test_resume_through_a_weights_only_file_equals_never_having_stopped(kind: Any) -> None:
    whole, stopped = parameters(), parameters()
    train(built(kind, whole), whole, range(8))  # over two SVDs
    first = built(kind, stopped)
    train(first, stopped, range(5))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = built(kind, stopped)
    second.load_state_dict(torch.load(file, weights_only=True))
    train(second, stopped, range(5, 8))
    torch.testing.assert_close(stopped, whole, rtol=0, atol=0)


def test_the_bases_count_as_state() -> None:
    params = parameters()
    optimizer = built(GaLoreTorchAdamW, params)
    train(optimizer, params, range(1))
    moments = 2 * (8 * 2 + 2 * 9 + 6)
    bases = 2 * 6 + 5 * 2
    assert optimizer_state_bytes(optimizer) == 4 * (moments + bases)


def test_a_rank_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="rank=0"):
        GaLoreTorchAdamW(parameters(), rank=0)


def test_an_unknown_side_is_refused() -> None:
    with pytest.raises(ValueError, match="proj_type=both: give one of std"):
        GaLoreTorchAdamW(parameters(), proj_type="both")


def test_a_groups_own_rank_holds_also_when_it_comes_later() -> None:
    first, second, _ = parameters()
    optimizer = GaLoreTorchAdamW([{"params": [first], "galore": True, "rank": 4}], **SETTINGS)
    optimizer.add_param_group({"params": [second], "galore": True})
    train(optimizer, [first, second], range(1))
    ranks = [optimizer.state[p]["projector"].ortho_matrix.shape for p in (first, second)]
    assert ranks == [(4, 6), (5, 2)]
