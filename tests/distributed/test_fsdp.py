"""Training on FSDP2 ranks is training on one: weights, checkpoints, export, and what is refused."""

from __future__ import annotations

import re
import shutil
from functools import partial

import bitsandbytes as bnb
import pytest
import torch
import transformers
from lightning.fabric.utilities.exceptions import MisconfigurationException
from peft import IA3Config
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim import SGD
from transformers import AutoConfig, AutoModelForCausalLM

from lit_ft import CausalLMModule
from lit_ft.callbacks import GaLore
from lit_ft.distributed import FSDP2Strategy, fully_shard_model
from lit_ft.models import Pretrained
from lit_ft.optim import MuonAdamW, stochastically_rounded
from lit_ft.optim.galore_torch import GaLoreTorchAdafactor
from tests.support.ranks import WORLD
from tests.support.sharded_training import LLAMA, OPTIMIZERS, train
from tests.support.tiny_module import trainer_of

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adamw"},
        {"optimizer": "adamw_fused", "accumulate": 2, "clip": 0.5},
        {"optimizer": "sgd", "activation_checkpointing": True},
        {"optimizer": "sgd", "layerwise": True},
        {"optimizer": "adamw_fused", "layerwise": True, "accumulate": 2},
        {"projector": "oja", "layerwise": True},
        {"projector": "oja", "cpu_offload": True, "clip": 0.01},
        {"projector": "oja", "accumulate": 2, "clip": 0.01},
        {"projector": "iteration", "optimizer": "adamw_fused", "activation_checkpointing": True},
        {"optimizer": "adafactor", "accumulate": 2, "clip": 0.5},
        {"optimizer": "adafactor_fixed", "layerwise": True},
        {"optimizer": "adafactor_fixed", "projector": "oja", "cpu_offload": True},
        {"optimizer": "adamw_8bit", "accumulate": 2, "cpu_offload": True},
    ],
)
def test_two_ranks_train_what_one_does(options, tied, folder, tmp_path, on_both):
    model = folder / f"tied_{tied}"
    weights, _, loss = train(model, tmp_path / "one", sharded=False, **options)
    both = on_both(train, model, tmp_path / "two", sharded=True, **options)
    for theirs, held, their_loss in both:
        assert set(held.values()) == {"DTensor"}
        assert theirs.keys() == weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(theirs[name], weight, rtol=0, atol=1e-10, msg=name)
        for name, value in loss.items():
            assert their_loss[name] == pytest.approx(value, rel=1e-9)
    for name in weights:
        assert both[0][0][name].equal(both[1][0][name])


def test_tracked_steps_train_the_same_weights_bit_for_bit(folder, tmp_path, on_both):
    options = {"projector": "oja", "layerwise": True, "accumulate": 2, "steps": 3, "sharded": True}
    model = folder / "tied_True"
    plain = on_both(train, model, tmp_path / "plain", **options)
    tracked = on_both(train, model, tmp_path / "tracked", tracked_steps=2, **options)
    for (weights, *_), (expected, *_) in zip(tracked, plain, strict=True):
        torch.testing.assert_close(weights, expected, rtol=0, atol=0)


def test_a_scaled_embedding_in_a_subspace_trains_as_on_one(tmp_path, on_both):
    torch.manual_seed(0)
    config = AutoConfig.for_model("gemma3_text", **LLAMA, head_dim=8)  # its weights are tied
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    options = {"projector": "oja", "layerwise": True, "optimizer": "sgd"}
    weights, _, _ = train(tmp_path / "model", tmp_path / "one", sharded=False, **options)
    for theirs, _, _ in on_both(train, tmp_path / "model", tmp_path, sharded=True, **options):
        assert "model.embed_tokens.delta" in theirs
        assert theirs.keys() == weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(theirs[name], weight, rtol=0, atol=1e-8, msg=name)


@pytest.mark.parametrize(
    ("precision", "projector", "dtype"),
    [
        ("bf16-true", None, torch.bfloat16),
        ("bf16-mixed", None, torch.float32),
        ("bf16-mixed", "oja", torch.float32),
    ],
)
def test_half_precision_trains_as_on_one_and_resumes(
    precision, projector, dtype, folder, tmp_path, on_both
):
    model, options = folder / "tied_True", {"precision": precision, "projector": projector}
    _, _, loss = train(model, tmp_path / "one", sharded=False, **options)
    (weights, _, its_loss), _ = on_both(train, model, tmp_path / "two", sharded=True, **options)
    assert weights["model.embed_tokens.weight"].dtype is dtype
    assert its_loss["train_loss"] == pytest.approx(loss["train_loss"], rel=3e-3)
    on_both(train, model, tmp_path / "part", sharded=True, steps=6, **options)
    options["resume"] = str(tmp_path / "part" / "checkpoints" / "last.ckpt")
    (resumed, _, _), _ = on_both(train, model, tmp_path / "rest", sharded=True, **options)
    for name, weight in weights.items():
        assert resumed[name].equal(weight), name  # the random bits of rounding too


def test_galore_in_bfloat16_is_refused(tmp_path):
    module = CausalLMModule(Pretrained(str(tmp_path)), optimizer=OPTIMIZERS["adamw"])
    module._device_mesh = object()
    trainer = trainer_of(tmp_path, strategy=FSDP2Strategy(), devices=WORLD, precision="bf16-true")
    with pytest.raises(MisconfigurationException) as raised:
        GaLore(rank=4).setup(trainer, module, "fit")
    assert "trainer.precision=bf16-mixed" in raised.value.on_command_line


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_the_export_is_the_trained_model(tied, dtype, folder, tmp_path, on_both):
    model, options = folder / f"tied_{tied}", {"projector": "oja", "steps": 3, "export": dtype}
    shutil.copytree(model, tmp_path / "export")  # an earlier export, which must not come first
    (weights, _, _), _ = on_both(train, model, tmp_path, sharded=True, **options)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype="auto")
    assert exported.dtype is getattr(torch, dtype)
    assert exported.config.architectures == ["LlamaForCausalLM"]
    found = exported.state_dict()
    assert found.keys() == {n for n in weights if not n.endswith((".basis", ".delta"))}
    for name, weight in found.items():
        assert weight.equal(weights[name].to(weight.dtype)), name
    with safe_open(next((tmp_path / "export").glob("*.safetensors")), "pt") as file:
        assert ("lm_head.weight" in file.keys()) is not tied  # noqa: SIM118


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"optimizer": partial(bnb.optim.AdamW8bit)}, "optim=adamw_8bit_torchao or"),
        ({"optimizer": partial(bnb.optim.PagedAdamW8bit)}, "optim=adamw_8bit_torchao or"),
        ({"optimizer": partial(torch.optim.Adafactor)}, "optim=adafactor_fixed.*strategy=ddp"),
        ({"optimizer": partial(transformers.Adafactor)}, "optim=adafactor_fixed"),
        ({"optimizer": partial(GaLoreTorchAdafactor)}, "galore-torch projects"),
        ({"optimizer": partial(torch.optim.LBFGS)}, "LBFGS looks at all gradients.*strategy=ddp"),
        ({"optimizer": partial(torch.optim.Muon)}, "Muon orthogonalises"),
        ({"optimizer": partial(MuonAdamW)}, "Muon orthogonalises"),
        ({"adapter": IA3Config(task_type="CAUSAL_LM")}, "LoRA alone works.*adapter=lora"),
        ({"compile": True}, "module.compile=false"),
    ],
)
def test_what_needs_weights_whole_is_refused_before_the_model_loads(options, named, tmp_path):
    module = CausalLMModule(
        Pretrained(str(tmp_path)), **{"optimizer": OPTIMIZERS["adamw"], **options}
    )
    module.trainer = trainer_of(tmp_path, strategy=FSDP2Strategy(), devices=WORLD)
    with pytest.raises(MisconfigurationException) as raised:
        module.setup("fit")
    assert re.search(named, raised.value.on_command_line)


class Inner(nn.Linear):
    pass


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.inner = nn.Linear(8, 8), Inner(8, 8)

    def forward(self, x):
        return self.inner(self.before(x))


class Nested(nn.Sequential):
    _no_split_modules = ("Outer", "Inner")


def round_a_shard():
    weight = distribute_tensor(torch.ones(64, 8), init_device_mesh("cpu", (WORLD,)), [Shard(0)])
    weight = torch.nn.Parameter(weight.bfloat16())
    optimizer = stochastically_rounded(SGD([weight], lr=1.0), seed=0)
    weight.grad = torch.full_like(weight, 2**-9)
    optimizer.step()
    return weight.to_local().detach()


def test_ranks_round_their_rows_by_bits_of_their_own(on_both):
    first, second = on_both(round_a_shard)
    assert 0.3 < (first != 1).float().mean() < 0.7
    assert not first.equal(second)


def train_nested():
    torch.manual_seed(0)
    model, x = Nested(Outer(), Outer(), nn.Linear(8, 8)), torch.randn(4, 8)
    expected = model(x).detach()
    fully_shard_model(model, init_device_mesh("cpu", (WORLD,)))
    assert model(x).allclose(expected)
    model(x).sum().backward()
    return [type(p.grad).__name__ for p in model.parameters()]


def test_blocks_inside_blocks_are_spread_too(on_both):
    for gradients in on_both(train_nested):
        assert set(gradients) == {"DTensor"}
