"""What the optimizers with a rule for matrices share: AdamW for the rest, and refusals."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch import LightningModule, Trainer
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from lit_ft.optim import Apollo, Scale, SinkGD, parameter_groups
from lit_ft.optim import matrix_optimizer as matrix_optimizer

KINDS: dict[str, Callable[..., Optimizer]] = {
    "scale": Scale,
    "sinkgd": SinkGD,
    "apollo": partial(Apollo, rank=4),
    "apollo_mini": partial(Apollo, rank=1, per="tensor"),
}
SHAPES = {"embed": (50, 16), "up": (64, 16), "down": (16, 64), "experts": (3, 8, 6), "norm": (16,)}


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in SHAPES.items()
    }


def set_gradients(named: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def groups_of(named: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Matrices and a vector in one group, and a matrix that AdamW steps in another."""
    return [
        {"params": [(name, p) for name, p in named.items() if name != "embed"]},
        {"params": [("embed", named["embed"])], "use_adamw": True, "weight_decay": 0.3},
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_and_marked_groups_take_torchs_adamw(kind: str) -> None:
    named, others = parameters(), parameters()
    optimizer = KINDS[kind](groups_of(named), lr=1e-2, weight_decay=0.1)
    adamw = AdamW(
        [
            {"params": [others["norm"]], "weight_decay": 0.1},
            {"params": [others["embed"]], "weight_decay": 0.3},
        ],
        lr=1e-2,
    )
    for step in range(4):
        set_gradients(named, step)
        set_gradients(others, step)
        for group in (*optimizer.param_groups, *adamw.param_groups):
            group["lr"] = 1e-2 / (step + 1)
        optimizer.step()
        adamw.step()
    for name in ("norm", "embed"):
        torch.testing.assert_close(named[name], others[name], rtol=0, atol=0)
        assert {"exp_avg", "exp_avg_sq"} <= set(optimizer.state[named[name]])
    assert ("step" in optimizer.state[named["experts"]]) == kind.startswith("apollo")


@pytest.mark.parametrize("kind", KINDS)
def test_a_reloaded_state_goes_on_bit_for_bit(kind: str) -> None:
    ends = []
    for reloads in (False, True):
        named = parameters()
        options = {"momentum": 0.9} if kind == "scale" else {}
        optimizer = KINDS[kind](groups_of(named), lr=1e-2, **options)
        for step in range(6):
            if step == 3 and reloads:
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                file.seek(0)
                optimizer = KINDS[kind](groups_of(named), lr=1e-2, **options)
                optimizer.load_state_dict(torch.load(file, weights_only=True))
            set_gradients(named, step)
            optimizer.step()
        ends.append([p.detach() for p in named.values()])
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_that_are_stepped_together_change_no_bit(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []
    for together in (1, 1100, 2**26):
        monkeypatch.setattr(matrix_optimizer, "_TOGETHER", together)
        named = parameters()
        optimizer = KINDS[kind](named.values(), lr=1e-2)
        set_gradients(named, 0)
        optimizer.step()
        ends.append([p.detach() for p in named.values()])
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=0)
    torch.testing.assert_close(ends[2], ends[0], rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_decay_shrinks_by_its_share_of_the_rate(kind: str) -> None:
    named = parameters()
    before = named["up"].detach().clone()
    optimizer = KINDS[kind]([named["up"]], lr=0.1, weight_decay=0.5)
    named["up"].grad = torch.zeros_like(named["up"])
    optimizer.step()
    torch.testing.assert_close(named["up"].detach(), before * 0.95)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", [0.0, 1e-2])
def test_zero_gradients_move_nothing(kind: str, rate: float) -> None:
    # As torch.distributed.checkpoint steps before it loads a state.
    named = parameters()
    before = [p.detach().clone() for p in named.values()]
    optimizer = KINDS[kind](named.values(), lr=rate)
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close([p.detach() for p in named.values()], before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_steps_are_float32_steps_rounded_to_nearest(kind: str) -> None:
    narrow, wide = parameters(torch.bfloat16), parameters()
    set_gradients(narrow, 0)
    for name, parameter in wide.items():
        parameter.data.copy_(narrow[name])
        parameter.grad = narrow[name].grad.float()
    for named in (narrow, wide):
        KINDS[kind]([p for n, p in named.items() if n != "norm"], lr=1e-2).step()
    for name in ("embed", "up", "down", "experts"):
        assert narrow[name].equal(wide[name].bfloat16()), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_closure_may_back_propagate(kind: str) -> None:
    named = parameters()
    optimizer = KINDS[kind](named.values(), lr=1e-2)
    before = [p.detach().clone() for p in named.values()]

    def closure() -> Tensor:
        loss = torch.stack([p.square().sum() for p in named.values()]).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    assert not any(p.equal(old) for p, old in zip(named.values(), before, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_cannot_take_is_refused(kind: str) -> None:
    weight = nn.Parameter(torch.ones(4, 2))
    weight.grad = torch.sparse_coo_tensor([[1]], [[1.0, 1.0]], (4, 2))
    with pytest.raises(RuntimeError, match="sparse"):
        KINDS[kind]([weight]).step()
    for name in ("lr", "weight_decay"):
        with pytest.raises(ValueError, match=f"{name}=-1"):
            KINDS[kind]([weight], **{name: -1})


class Regression(LightningModule):
    """Another project's module: one group of all parameters."""

    def __init__(self, kind: Callable[..., Optimizer]) -> None:
        super().__init__()
        self.kind = kind
        self.net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self.net(batch[0]) - batch[0][:, :4].sin()).square().mean()

    def configure_optimizers(self) -> Optimizer:
        return self.kind(self.parameters(), lr=5e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_in_a_plain_lightning_project(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Regression(KINDS[kind])
    rows = torch.utils.data.TensorDataset(torch.randn(256, 8))
    batch = [rows[:][0]]
    before = float(module.training_step(batch, 0))
    trainer = Trainer(
        max_epochs=10,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, DataLoader(rows, batch_size=32))
    assert float(module.training_step(batch, 0)) < before / 4


@pytest.mark.parametrize(
    ("rules", "family", "options", "expected"),
    [
        (
            "scale_matrices",
            "llama",
            {"tie_word_embeddings": True},
            {"head": {"model.embed_tokens.weight"}, "embeddings": set()},
        ),
        (
            "scale_matrices",
            "llama",
            {"tie_word_embeddings": False},
            {"head": {"lm_head.weight"}, "embeddings": {"model.embed_tokens.weight"}},
        ),
        (
            "scale_matrices",
            "gpt2",
            {},
            {
                "head": {"transformer.wte.weight"},
                "embeddings": {"transformer.wpe.weight"},
            },
        ),
        (
            "hidden_matrices",
            "gpt_neox",
            {},
            {"embeddings": {"gpt_neox.embed_in.weight", "lm_head.weight"}},
        ),
    ],
)
def test_the_configured_rules_know_embeddings_and_heads(
    rules: str, family: str, options: dict[str, Any], expected: dict[str, set[str]]
) -> None:
    path = Path(__file__).parents[2] / "conf" / "optim" / "groups" / f"{rules}.yaml"
    made = instantiate(OmegaConf.load(path).groups, _convert_="all")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options))
    groups = parameter_groups(model.named_parameters(remove_duplicate=False), made)
    members = {group["name"]: {name for name, _ in group["params"]} for group in groups}
    for name, parameters_of_it in expected.items():
        assert members.get(name, set()) == parameters_of_it
    assert len(set.union(*members.values())) == len(dict(model.named_parameters()))
