"""The main job on a GPU: the choices whose code there is another than on the CPU."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import pytest
import torch
from hydra.errors import CompactHydraException
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from support.gpu_cells import packed_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lit_ft.models.export.whole import merged
from lit_ft.subspace import inject
from lit_ft.tensors.stochastic_rounding import random_bits, round_moved, round_with
from tests.support.running import ANYWHERE, CONF, SAMPLES, run_job
from tests.support.stopping import at
from tests.support.tiny_model import tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

OPTIMS = sorted(path.stem for path in CONF.glob("optim/*.yaml"))
ADAPTERS = sorted({path.stem for path in CONF.glob("adapter/*.yaml")} - {"qlora"})  # random weights
STRATEGIES = ("auto", "ddp", "fsdp", "fsdp_offload", "single_gpu", "single_gpu_offload")
TINY = ["model=tiny", *packed_tokenizer(), *(each for each in ANYWHERE if each != SAMPLES)]
PLAINLY = ["optim.lr=2e-3", "trainer.max_steps=8"]  # a fall that bfloat16 logits show
EXPORTS = ["callbacks=default", "~callbacks.samples"]


def trained(run_dir: Path, *overrides: str) -> dict:
    chosen = any(each.startswith("callbacks=") for each in overrides)
    callbacks = [] if chosen else ["callbacks=none"]
    summary = run_job(run_dir, *TINY, *callbacks, "schedule=constant", *overrides)
    assert summary["status"] == "completed"
    assert summary["peak_bytes"]["source"] == "cuda_allocated"
    assert math.isfinite(summary["val_loss"])
    return summary


@pytest.mark.parametrize("optim", OPTIMS)
def test_every_optimizer_learns_in_bfloat16(optim, tmp_path):
    summary = trained(tmp_path, f"optim={optim}", "trainer.max_steps=12")
    assert summary["config"]["trainer"]["precision"] == "bf16-true"
    assert summary["val_loss"] < summary["initial_val_loss"]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize(
    "optim", ["adamw", "galore_subspace", "adamw_8bit galore=iteration", "muon"]
)
def test_every_precision_learns(optim, precision, tmp_path):
    chosen = f"optim={optim}".split()
    summary = trained(tmp_path, *chosen, f"trainer.precision={precision}", *PLAINLY)
    assert summary["val_loss"] < summary["initial_val_loss"]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_adapter_learns(adapter, tmp_path):
    summary = trained(tmp_path, f"adapter={adapter}", "optim=adamw", *PLAINLY)
    assert summary["val_loss"] < summary["initial_val_loss"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("optim", ["adamw", "galore_subspace"])
def test_one_gpu_trains_with_every_strategy(strategy, optim, tmp_path):
    alone = ["trainer.devices=1"] if strategy != "single_gpu" else []
    summary = trained(tmp_path, f"strategy={strategy}", f"optim={optim}", *alone, *PLAINLY)
    assert summary["val_loss"] < summary["initial_val_loss"]


@pytest.mark.parametrize(
    "settings",
    [
        ["module.compile=true"],
        ["module.activation_checkpointing=true"],
        ["module.compile=true", "module.activation_checkpointing=true"],
        ["callbacks=auto_batch_size"],
        ["update=whole", "trainer.gradient_clip_val=1.0", "trainer.accumulate_grad_batches=2"],
        ["data=packed"],
        ["callbacks=default", SAMPLES],
    ],
    ids=" ".join,
)
def test_settings_of_a_step(settings, tmp_path):
    summary = trained(tmp_path, *settings, *PLAINLY)
    assert summary["val_loss"] < summary["initial_val_loss"]


@pytest.mark.parametrize("optim", ["adamw", "galore_subspace", "galore_subspace_8bit", "galore"])
@pytest.mark.parametrize("precision", ["bf16-true", "32-true"])
def test_resumed_as_if_never_stopped(optim, precision, tmp_path):
    settings = [f"optim={optim}", f"trainer.precision={precision}", "+trainer.deterministic=warn"]
    if optim.startswith("galore"):
        settings.append("galore.rank=8")
    whole = trained(tmp_path / "whole", *settings, *EXPORTS, "trainer.max_steps=5")
    trained(tmp_path / "parts", *settings, *EXPORTS, "trainer.max_steps=2")
    again = ["trainer.max_steps=5", "resume=auto"]
    resumed = trained(tmp_path / "parts", *settings, *EXPORTS, *again)
    assert resumed["val_loss"] == whole["val_loss"]
    weights = [load_file(tmp_path / run / "export/model.safetensors") for run in ("whole", "parts")]
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name


def test_a_gpu_trains_the_weights_that_the_cpu_trains(tmp_path):
    exports = []
    for strategy in ("cpu", "single_gpu"):
        # SGD: Adam's first steps are signs, which the last bit of a small gradient can turn.
        settings = ["optim=sgd", f"strategy={strategy}", "trainer.precision=32-true"]
        run_job(tmp_path / strategy, *TINY, *settings, *EXPORTS)
        exports.append(load_file(tmp_path / strategy / "export/model.safetensors"))
    for name, weight in exports[0].items():
        torch.testing.assert_close(weight, exports[1][name], rtol=1e-3, atol=1e-5)


def test_what_the_memory_held_when_it_ran_out_is_kept_with_the_code(tmp_path):
    settings = [*TINY, *EXPORTS, "callbacks.memory.snapshot_history=1000"]
    with pytest.raises(CompactHydraException, match="memory_snapshot_0.pickle"):
        run_job(tmp_path, *settings, *at("on_before_backward", 1, fault="out_of_memory"))
    held = pickle.loads((tmp_path / "memory_snapshot_0.pickle").read_bytes())
    assert any(segment["allocated_size"] for segment in held["segments"])
    assert any(event["frames"] for events in held["device_traces"] for event in events)


def test_4_bit_weights_are_dequantised_on_the_host(tmp_path):
    tiny_model("llama", hidden_size=512, intermediate_size=2048).save_pretrained(tmp_path)
    in_4_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)
    load = AutoModelForCausalLM.from_pretrained
    base = load(tmp_path, quantization_config=in_4_bits, dtype=torch.bfloat16, device_map={"": 0})
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    ids = torch.arange(3, 35, device="cuda")[None]
    expected = model(ids).logits
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    whole = merged(model)
    size = sum(p.nbytes for p in whole.parameters())
    assert torch.cuda.max_memory_allocated() - before < size / 4
    assert {p.device.type for p in whole.parameters()} == {"cpu"}
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)
    near = {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(whole.cuda()(ids).logits, expected, **near)


def test_galore_takes_less_memory_than_adamw(tmp_path):
    wide = ["model.config.hidden_size=1024", "model.config.intermediate_size=4096"]
    peak = {
        optim: trained(tmp_path / optim, *wide, f"optim={optim}")["peak_bytes"]["value"]
        for optim in ("adamw", "galore_subspace_8bit")
    }
    assert peak["galore_subspace_8bit"] < 0.6 * peak["adamw"]


def test_one_kernel_rounds_as_the_cpu_does():
    x = torch.randn(3, 1000) * torch.logspace(-44, 38, 1000)
    x[0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, torch.finfo(torch.float32).max])
    bits = random_bits(x.shape, x.device, generator=torch.Generator().manual_seed(0))
    on_gpu = round_with(x.cuda(), bits.cuda())
    torch.testing.assert_close(on_gpu.cpu(), round_with(x, bits), rtol=0, atol=0, equal_nan=True)
    weight = torch.randn(3, 1000).bfloat16()  # whose half has no more digits: no sum is rounded
    at_once = round_moved(weight.cuda(), x.cuda(), bits.cuda(), keep=0.5)
    expected = round_moved(weight, x, bits, keep=0.5)
    torch.testing.assert_close(at_once.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_fold_moves_bfloat16_weights_by_the_step_on_average(side):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4096, 5000, bias=False, dtype=torch.bfloat16, device="cuda"))
    [layer] = inject(model, rank=16, side=side).values()
    before = layer.weight.double()
    layer.delta.data.normal_(std=1e-4)
    delta, basis = layer.delta.detach().double(), layer.basis.double()
    step = 2 * delta @ basis
    layer.fold(scale=2.0, decay=0.25, rounding_key=(0, 0, 0))
    expected = 0.75 * before + (step if side == "right" else step.T)
    error = layer.weight.double() - expected
    assert (error.abs() <= expected.abs() * 2**-7 + step.abs().max() * 2**-7).all()
    # What rounding to nearest would lose of the step stays in the mean, to three digits.
    moved = ((layer.weight.double() - 0.75 * before) * (expected - 0.75 * before)).sum()
    assert abs(moved / step.square().sum() - 1) < 0.02
    assert not layer.delta.any()
