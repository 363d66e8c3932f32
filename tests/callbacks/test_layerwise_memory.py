"""The peak of a step, counted by allocations, in the job that a user starts on SmolLM2-135M."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

from tests.support.allocations import PeakAllocated, live_bytes

ROOT = Path(__file__).parents[2]
SMOLLM2_BYTES = 4 * 134_515_008

pytestmark = pytest.mark.slow

JOB = [
    "strategy=single_gpu",
    "trainer.accelerator=cpu",
    "trainer.max_steps=8",
    "module.activation_checkpointing=true",
    "data=packed",
    "data.max_length=512",
    "data.max_val_examples=1",  # what is measured lies between two validations
    "callbacks=none",
    "logger=none",
    "plan.check=false",
    "+callbacks.probe._target_=tests.callbacks.test_layerwise_memory.Probe",
    "trusted_packages=[tests]",
]


class Probe(Callback):
    """Measures from the fifth step on: in four steps every layer's basis moves once."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 4:
            assert batch["input_ids"].numel() == 512
            self.before = live_bytes()
            self.recorded = PeakAllocated()
            self.recorded.__enter__()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.recorded.__exit__(None, None, None)
        peak = self.before + self.recorded.bytes
        Path(trainer.default_root_dir, "peak").write_text(str(peak))


def peak(run_dir: Path, *overrides: str) -> int:
    """Run the job in a process of its own and return the most bytes that tensors took."""
    command = [sys.executable, "train.py", f"run_dir={run_dir}", *JOB, *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return int((run_dir / "peak").read_text())


def test_layerwise_8_bit_steps_take_three_quarters_of_whole_ones(tmp_path: Path) -> None:
    job = ["optim=adamw_8bit", "trainer.gradient_clip_val=null", "trainer.max_steps=5"]
    whole = peak(tmp_path / "whole", *job, "update=whole")
    assert peak(tmp_path / "layerwise", *job) <= 0.75 * whole


def test_the_recipe_takes_less_than_half_a_model_beside_the_model(tmp_path: Path) -> None:
    taken = peak(tmp_path, "optim=galore_subspace_8bit", "galore.rank=64")
    assert taken <= 1.45 * SMOLLM2_BYTES
