"""Memory plans against what the same runs take."""

from __future__ import annotations

import pytest
from hydra.utils import instantiate

from lit_ft.run.arguments import composed
from lit_ft.run.fake_run import _batch, _built, plan_run
from tests.support.allocations import PeakAllocated

SMALL = [
    "model=tiny",
    "strategy=cpu",
    "model.config.vocab_size=4096",
    "data.max_length=96",
    "trainer.precision=32-true",
    "logger=none",
]


class Once:
    def __init__(self, batch):
        self.batch = batch

    def __iter__(self):
        while True:
            yield dict(self.batch)


def taken(arguments: list[str]) -> int:
    """Return the most bytes that torch allocates in the fit that a plan is made of."""
    config = composed(arguments)
    source = instantiate(config["model"], _convert_="all")
    loss = instantiate(config["loss"], _convert_="all")
    module, trainer = _built(config, source, source.load_config(), loss, None)
    module.source = source
    rows, length = config["data"]["batch_size"], config["data"]["max_length"]
    with PeakAllocated() as true:
        trainer.fit(
            module,
            Once(_batch(rows, length, packed=config["data"]["packing"])),
            Once(_batch(rows, length, packed=False)),
        )
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
        ["optim=adamw", "trainer.precision=bf16-true"],
        ["optim=galore_subspace", "galore.rank=16", "trainer.precision=bf16-mixed"],
    ],
    ids=" ".join,
)
def test_the_planned_peak_is_the_true_one(arguments):
    arguments = [*SMALL, *arguments]
    true = taken(arguments)
    plan = plan_run(composed(arguments), device_type="cpu")
    assert -0.005 <= plan.peak_bytes / true - 1 <= 0.04
    assert plan.peak_bytes == sum(plan.by_category.values()) == max(plan.by_phase.values())


@pytest.mark.parametrize(
    "arguments",
    [
        ["optim=adamw"],
        ["optim=adamw_8bit", "update=layerwise", "module.activation_checkpointing=true"],
        ["optim=galore_subspace", "galore.rank=16"],
        ["optim=adamw", "adapter=lora"],
        ["optim=adamw", "strategy=fsdp", "trainer.devices=4", "trainer.accelerator=cpu"],
    ],
    ids=" ".join,
)
def test_deep_models_follow_from_shallow_ones(arguments, monkeypatch):
    arguments = [*SMALL, *arguments, "model.config.num_hidden_layers=9"]
    extended = plan_run(composed(arguments), device_type="cpu")
    assert extended.simulated_blocks == (3, 4)
    monkeypatch.setattr("lit_ft.run.fake_run._all_alike", lambda _: False)
    whole = plan_run(composed(arguments), device_type="cpu")
    assert whole.simulated_blocks == (9,)
    assert extended.peak_bytes == whole.peak_bytes
    assert extended.by_phase | {"load": 0} == whole.by_phase | {"load": 0}
