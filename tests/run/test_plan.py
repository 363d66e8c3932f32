"""Memory plans against what the same runs take."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from lit_ft.compat.refusal import Refusal
from lit_ft.measure.fake_tensors import fake_tensors
from lit_ft.measure.live_memory import MemoryTracker
from lit_ft.run.arguments import composed
from lit_ft.run.fake_run import plan_run
from tests.support.allocations import PeakAllocated
from tests.support.planned_fit import SMALL, planned_fit
from tests.support.running import CONF
from tests.support.tiny_model import tiny_model

OPTIMS = sorted(path.stem for path in CONF.glob("optim/*.yaml"))
SHORT = ["data.max_length=16", "data.batch_size=1", "trainer.gradient_clip_val=null"]


def taken(arguments: list[str]) -> int:
    """Return the most bytes that torch allocates in the fit that a plan is made of."""
    _, fit = planned_fit(arguments)
    with PeakAllocated() as true:
        fit()
    return true.bytes


@pytest.mark.parametrize(
    "arguments",
    [
        ["optim=adamw"],
        ["optim=adamw", "update=layerwise", "trainer.gradient_clip_val=null"],
        ["optim=adamw", "module.activation_checkpointing=true", "data.packing=true"],
        ["optim=adamw", "trainer.accumulate_grad_batches=2"],
        ["optim=adamw_8bit", "update=layerwise"],
        ["optim=adafactor_fixed"],
        ["optim=muon"],
        ["optim=sgd", "data.batch_size=1"],
        ["optim=galore_subspace", "galore.rank=16"],
        ["optim=galore_subspace_8bit", "galore.rank=16", "module.activation_checkpointing=true"],
        ["optim=galore", "galore.rank=16"],
        ["optim=adamw", "adapter=lora"],
        ["optim=adamw", "adapter=dora", "module.activation_checkpointing=true"],
        ["optim=adamw", "adapter=lora", "trainer.precision=bf16-true"],
        # Merging takes more than training.
        [*SHORT, "optim=adamw", "adapter=lora", "module.activation_checkpointing=true"],
        [*SHORT, "optim=sgd", "update=layerwise", "+callbacks.export.dtype=bfloat16"],
        ["optim=adamw", "trainer.precision=bf16-true"],
        ["optim=galore_subspace", "galore.rank=16", "trainer.precision=bf16-mixed"],
        ["update=blocks"],
        ["update=blocks", "callbacks.blocks.state=keep"],
        ["update=blocks", "optim=adamw_8bit", "trainer.precision=bf16-true"],
    ],
    ids=" ".join,
)
def test_the_planned_peak_is_the_true_one(arguments):
    arguments = [*SMALL, *arguments]
    true = taken(arguments)
    plan = plan_run(composed(arguments), device_type="cpu")
    assert -0.005 <= plan.peak_bytes / true - 1 <= 0.04
    assert plan.peak_bytes == sum(plan.by_category.values()) == max(plan.peak_by_phase.values())
    assert plan.by_category == plan.by_phase[plan.peak_phase]


def test_copies_of_fake_tensors_touch_no_memory():
    """Torch's own copy reads and writes memory that is not there, and the process may die later."""
    with fake_tensors(MemoryTracker()) as _:
        tensor = torch.ones(2**20)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch warns of each look at the memory
            copied, again = copy.deepcopy([tensor, tensor])
    assert copied is again and copied is not tensor and copied.shape == tensor.shape


def test_a_plan_says_where_its_peak_is():
    arguments = [*SMALL, "model.config.vocab_size=65536", "model.config.num_hidden_layers=3"]
    plan = plan_run(composed([*arguments, "adapter=lora"]), device_type="cpu")
    operation, *stack = plan.peak_stack
    assert operation.startswith("aten.") and operation.endswith(" after the last block")
    assert any(one.startswith("chunked_cross_entropy, chunked.py:") for one in stack)


@pytest.mark.parametrize("double", ["true", "false"])
def test_the_planned_peak_of_4_bit_weights_is_the_true_one(tmp_path, double):
    sizes = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512}
    tiny_model("llama", **sizes, num_hidden_layers=3).save_pretrained(tmp_path)
    arguments = [
        *("model=pretrained", f"model.name_or_path={tmp_path}", "strategy=cpu", "logger=none"),
        *("adapter=qlora", "optim=adamw_lora", "data.max_length=96"),
        # The profiler misses how loading frees weights in float32, so a batch must take more.
        "trainer.precision=bf16-true",
        f"model.quantization_config.bnb_4bit_use_double_quant={double}",
    ]
    plan = plan_run(composed(arguments), device_type="cpu")
    assert -0.005 <= plan.peak_bytes / taken(arguments) - 1 <= 0.01
    in_4_bits = 3 * (256 * (256 + 128 + 128 + 256) + 3 * 256 * 512)
    in_16_bits = 2 * 4096 * 256
    assert plan.held_bytes["weights"] < 0.6 * in_4_bits + 2 * 1.2 * in_16_bits


@pytest.mark.parametrize("optim", OPTIMS)
def test_each_optimizer_is_planned_for_a_gpu_that_is_not_there(optim):
    arguments = [*SMALL, f"optim={optim}", "update=whole"]
    try:
        plan = plan_run(composed(arguments), device_type="cuda")
    except ValueError as refusal:
        assert "plan with optim=" in str(refusal)
    else:
        on_cpu = plan_run(composed(arguments), device_type="cpu")
        state, least = plan.held_bytes["optimizer"], on_cpu.held_bytes["optimizer"]
        # Torch's CUDA allocator gives out multiples of 512 bytes.
        assert least <= state <= least + 512 * 200


@pytest.mark.process
@pytest.mark.parametrize(
    "arguments",
    [
        ["optim=adamw"],
        ["optim=adamw_8bit", "update=layerwise", "module.activation_checkpointing=true"],
        ["optim=galore_subspace", "galore.rank=16"],
        ["optim=adamw", "adapter=lora"],
        ["update=blocks"],
        ["update=blocks", "callbacks.blocks.active=3"],
        ["optim=adamw", "strategy=fsdp", "trainer.devices=4", "trainer.accelerator=cpu"],
    ],
    ids=" ".join,
)
def test_deep_models_follow_from_shallow_ones(arguments, monkeypatch):
    arguments = [*SMALL, *arguments, "model.config.num_hidden_layers=9"]
    extended = plan_run(composed(arguments), device_type="cpu")
    shallow = 5 if "callbacks.blocks.active=3" in arguments else 3
    assert extended.simulated_blocks == (shallow, shallow + 1)
    monkeypatch.setattr("lit_ft.run.fake_run._all_alike", lambda _: False)
    whole = plan_run(composed(arguments), device_type="cpu")
    assert whole.simulated_blocks == (9,)
    assert extended.peak_bytes == whole.peak_bytes
    assert extended.by_phase == whole.by_phase


@pytest.mark.process
@pytest.mark.parametrize(
    ("always", "simulated"),
    [("[embeddings,head]", (3, 4)), ("head", (3, 4)), ("[embeddings,layers.5.mlp]", (9,))],
)
def test_what_is_always_trained_is_planned_where_it_is(always, simulated):
    arguments = [*SMALL, "model.config.num_hidden_layers=9", "update=blocks"]
    arguments += [f"callbacks.blocks.always={always}"]
    assert plan_run(composed(arguments), device_type="cpu").simulated_blocks == simulated


def test_a_wrong_always_is_answered_with_its_correction():
    arguments = [*SMALL, "update=blocks", "callbacks.blocks.always=[layers.99.mlp]"]
    with pytest.raises(Refusal, match="always='layers.99.mlp' fits no trainable") as said:
        plan_run(composed(arguments), device_type="cpu")
    assert "Correct callbacks.blocks.always" in said.value.on_command_line
    assert "update=whole" not in said.value.on_command_line
