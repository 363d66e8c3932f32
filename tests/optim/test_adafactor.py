"""Adafactor is transformers'; the rate of its own that it reports is the one that was used."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from lit_ft.optim import narrowed
from lit_ft.optim.adafactor import Adafactor, RelativeStepAdafactor


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 4), (16,), (5, 3)]
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def set_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in params:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    relative = draw(st.booleans())
    return {
        "lr": None if relative else draw(st.floats(1e-4, 1e-1)),
        "relative_step": relative,
        "warmup_init": relative and draw(st.booleans()),
        "scale_parameter": draw(st.booleans()),
        "beta1": draw(st.sampled_from([None, 0.9])),
        "weight_decay": draw(st.sampled_from([0.0, 0.1])),
        "clip_threshold": draw(st.floats(0.1, 2.0)),
        "decay_rate": draw(st.floats(-1.0, -0.3)),
    }


@settings(max_examples=40)
@given(
    shape=st.lists(st.integers(1, 9), max_size=4),
    options=options(),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_weights_are_those_of_transformers(
    shape: list[int], options: dict[str, Any], seed: int, dtype: torch.dtype
) -> None:
    weights = []
    for kind in (Adafactor, transformers.Adafactor):
        generator = torch.Generator().manual_seed(seed)
        scale = 10 ** torch.randn(shape, generator=generator)  # rows and columns that differ
        weight = torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        optimizer = kind([weight], **options)
        for step in range(4):
            gradient = scale * torch.randn(shape, generator=generator) * (step != 2)
            weight.grad = gradient.to(dtype)
            optimizer.step()
        weights.append(weight.detach())
    # The size of an update comes from other sums. In 16 bits a weight may round the other way.
    rtol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(*weights, rtol=rtol, atol=rtol / 10)


def test_resuming_keeps_bfloat16_weights_on_their_way() -> None:
    ends = []
    for kind in (Adafactor, transformers.Adafactor):
        weight = torch.nn.Parameter(torch.ones(8, 4, dtype=torch.bfloat16))
        optimizer = kind([weight], lr=0.1, relative_step=False, scale_parameter=False)
        for step in range(4):
            weight.grad = torch.randn(
                8, 4, generator=torch.Generator().manual_seed(step)
            ).bfloat16()
            optimizer.step()
            assert optimizer.state[weight]["exp_avg_sq_row"].dtype is torch.float32
            optimizer.load_state_dict(optimizer.state_dict())  # casts it to the weights' type
        ends.append(weight.detach())
    torch.testing.assert_close(*ends, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("kind", [Adafactor, RelativeStepAdafactor])
def test_a_step_at_rate_zero_makes_state_and_moves_nothing(kind: type[Adafactor]) -> None:
    # As torch.distributed.checkpoint takes it before it loads a state.
    weights = parameters()
    before = [weight.detach().clone() for weight in weights]
    optimizer = kind(weights, weight_decay=0.1)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert all("step" in optimizer.state[weight] for weight in weights)
    torch.testing.assert_close(weights, before, rtol=0, atol=0)


def test_a_sparse_gradient_is_refused() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 2))
    weight.grad = torch.sparse_coo_tensor([[1]], [[1.0, 1.0]], (4, 2))
    with pytest.raises(RuntimeError, match="sparse"):
        Adafactor([weight]).step()


def test_the_reported_rate_is_the_size_of_the_step() -> None:
    # The second moment of Adafactor's first step is the gradient's square: a vector moves by ±lr.
    vector = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = RelativeStepAdafactor([vector])
    announced = optimizer.param_groups[0]["lr"]
    before = vector.detach().clone()
    vector.grad = torch.tensor([0.3, -7.0])
    optimizer.step()
    used = (vector.detach() - before).abs()
    assert used.tolist() == pytest.approx([1e-2 * 12.5**0.5] * 2, rel=1e-4)
    assert announced == pytest.approx(used[0].item(), rel=1e-4)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(used[0].item(), rel=1e-4)


def test_the_rate_of_a_group_is_the_mean_of_those_stepped() -> None:
    small, large = (
        torch.nn.Parameter(torch.full((4,), 1.0)),
        torch.nn.Parameter(torch.full((4,), 3.0)),
    )
    optimizer = RelativeStepAdafactor([small, large])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2e-2)
    large.grad = torch.ones(4)
    with narrowed(optimizer, large):
        optimizer.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(3e-2)


def test_writing_the_rate_changes_nothing() -> None:
    ours, theirs = parameters(), parameters()
    optimizer, plain = RelativeStepAdafactor(ours), RelativeStepAdafactor(theirs)
    optimizer.param_groups[0]["lr"] = 1e3
    set_gradients(ours, 0)
    set_gradients(theirs, 0)
    optimizer.step()
    plain.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("by_name", [False, True])
def test_the_closure_may_back_propagate(by_name: bool) -> None:
    params = parameters()
    optimizer = RelativeStepAdafactor(params)
    before = [parameter.detach().clone() for parameter in params]

    def closure() -> Tensor:
        loss = torch.stack([parameter.square().sum() for parameter in params]).sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
    assert loss.item() > 0
    assert not any(a.equal(b) for a, b in zip(params, before, strict=True))


def test_a_rate_of_ones_own_is_refused() -> None:
    with pytest.raises(ValueError, match="manual `lr`"):
        RelativeStepAdafactor(parameters(), lr=1e-3)
    assert RelativeStepAdafactor.sets_own_learning_rate


class TinyModule(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return RelativeStepAdafactor(self.named_parameters())


@pytest.mark.filterwarnings("ignore")
def test_lightnings_monitor_shows_it(tmp_path: Path) -> None:
    trainer = Trainer(
        accelerator="cpu",
        max_steps=3,
        log_every_n_steps=1,
        logger=CSVLogger(tmp_path),
        callbacks=[LearningRateMonitor("step")],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(TinyModule(), DataLoader(torch.ones(12, 4), batch_size=4))
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        rates = [float(row["lr-RelativeStepAdafactor"]) for row in csv.DictReader(file)]
    assert len(rates) == 3
    assert all(0 < rate < 1e-2 for rate in rates)


def test_relative_size_scales_the_first_step():
    moved = []
    for size in (1.0, 0.25):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(6, 4))
        before = weight.detach().clone()
        optimizer = RelativeStepAdafactor([weight], relative_size=size, weight_decay=0.0)
        weight.grad = torch.randn(6, 4)
        optimizer.step()
        moved.append(weight.detach() - before)
    torch.testing.assert_close(moved[1], 0.25 * moved[0])
    with pytest.raises(ValueError, match="relative_size=0"):
        RelativeStepAdafactor([torch.nn.Parameter(torch.ones(2))], relative_size=0)
