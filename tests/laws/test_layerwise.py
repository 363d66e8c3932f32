"""Layerwise updates are whole ones, bit for bit: weights, state and schedule of real runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.checkpoints import same
from tests.support.running import CONF, run_job

OPTIMIZERS = [
    *sorted(path.stem for path in (CONF / "optim").glob("*.yaml")),
    "adafactor_fixed galore=iteration",
    "adamw galore=paper",
    "adamw_8bit galore=iteration",
    "adamw_8bit_torchao galore=online",
]

COMPILED = "adamw_8bit_torchao"  # whose steps a C++ compiler compiles first

JOB = [
    "model=tiny",
    "strategy=cpu",
    "logger=none",
    "~callbacks.samples",
    "~callbacks.export",
    "schedule=cosine",
    "data.max_length=96",
    "data.batch_size=2",
    "data.max_val_examples=2",
    "trainer.max_steps=6",
]

LAYERWISE = ["update=layerwise", "callbacks.layerwise.min_grad_bytes=0"]


def run(folder: Path, optimizer: str, *overrides: str) -> Path:
    galore = "galore" in optimizer and not optimizer.startswith("galore_torch")
    small = ["galore.rank=8", "galore.targets=[mlp,embeddings,head]"] if galore else []
    run_job(folder, *JOB, *f"optim={optimizer}".split(), *small, *overrides)
    return folder


@pytest.mark.parametrize(
    "optimizer",
    [pytest.param(x, marks=pytest.mark.slow) if x == COMPILED else x for x in OPTIMIZERS],
)
def test_every_optimizer_trains_the_same_weights(optimizer: str, tmp_path: Path) -> None:
    options = ["trainer.gradient_clip_val=null"]
    whole = run(tmp_path / "whole", optimizer, *options)
    same(whole, run(tmp_path / "layerwise", optimizer, *options, *LAYERWISE))


# The long tier clips and accumulates with every optimizer.
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("adamw_8bit", ["trainer.gradient_clip_val=0.5"]),
        ("galore_subspace", ["trainer.gradient_clip_val=0.5"]),
        (
            "galore_subspace",
            ["trainer.gradient_clip_val=0.001", "+trainer.gradient_clip_algorithm=value"],
        ),
        ("adamw", ["trainer.gradient_clip_val=0.5", "trainer.accumulate_grad_batches=4"]),
        ("galore_subspace", ["trainer.gradient_clip_val=0.5", "trainer.accumulate_grad_batches=4"]),
        ("adamw", ["trainer.gradient_clip_val=0.5", "module.activation_checkpointing=true"]),
        ("adamw_8bit", ["trainer.precision=bf16-true", "trainer.max_steps=5"]),
        (
            "galore_subspace",
            [
                "trainer.precision=bf16-true",
                "trainer.gradient_clip_val=null",
                "trainer.max_steps=5",
            ],
        ),
    ],
)
def test_clipping_and_accumulation_compose(
    optimizer: str, options: list[str], tmp_path: Path
) -> None:
    whole = run(tmp_path / "whole", optimizer, *options)
    same(whole, run(tmp_path / "layerwise", optimizer, *options, *LAYERWISE))


BY_SVD = ("galore_svd", "adamw galore=paper")  # their gradients change after backward


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_clips_and_accumulates(optimizer: str, tmp_path: Path) -> None:
    options = ["trainer.accumulate_grad_batches=2", "trainer.max_steps=5"]
    options.append("trainer.gradient_clip_val=0.5")
    if optimizer in BY_SVD:
        with pytest.raises(Exception, match="gradient_clip_val=null"):
            run(tmp_path / "refused", optimizer, *options, *LAYERWISE)
        options.pop()
        options.append("trainer.gradient_clip_val=null")
    whole = run(tmp_path / "whole", optimizer, *options)
    same(whole, run(tmp_path / "layerwise", optimizer, *options, *LAYERWISE))


@pytest.mark.parametrize(
    ("optimizer", "stop", "first", "then"),
    [
        *(("adamw_8bit", stop, LAYERWISE, LAYERWISE) for stop in (1, 4)),
        ("adamw", 2, LAYERWISE, []),
        ("muon", 3, [], LAYERWISE),
        ("adafactor", 4, LAYERWISE, []),
        ("galore_subspace", 3, [], LAYERWISE),
        ("galore_svd", 5, LAYERWISE, []),
    ],
)
def test_a_stopped_run_goes_on_as_either(
    optimizer: str, stop: int, first: list[str], then: list[str], tmp_path: Path
) -> None:
    # A cosine would be as long as the run, and so would a warm-up in parts of it.
    options = ["schedule=constant", "schedule.warmup=0", "trainer.gradient_clip_val=null"]
    whole = run(tmp_path / "uninterrupted", optimizer, *options, "trainer.max_steps=6")
    run(tmp_path / "parts", optimizer, *options, f"trainer.max_steps={stop}", *first)
    resumed = [*options, "trainer.max_steps=6", "resume=auto", *then]
    same(whole, run(tmp_path / "parts", optimizer, *resumed))
