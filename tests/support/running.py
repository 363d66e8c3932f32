"""Runs the main job inside the test's process: imports cost seconds, a tiny job does not."""

from __future__ import annotations

import json
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict

import train

CONF = Path(train.__file__).parent / "conf"

# Without a plan, which takes longer than a tiny run: tests/run/test_memory_check.py plans.
ALWAYS = ["~local", "plan.check=false"]

SAMPLES = "+callbacks.samples.max_new_tokens=4"

ANYWHERE = [
    "trainer.max_steps=3",
    "trainer.log_every_n_steps=1",
    "data.batch_size=2",
    "data.max_length=160",
    "data.max_val_examples=4",
    SAMPLES,
]

SHORT = [*ANYWHERE, "strategy=cpu"]


def run_job(run_dir: Path, *overrides: str) -> dict:
    """Run `python train.py` with these overrides and return its summary."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(
            "train", [f"run_dir={run_dir}", *ALWAYS, *overrides], return_hydra_config=True
        )
    with open_dict(config):
        config.hydra.runtime.output_dir = str(run_dir)
        HydraConfig.instance().set_config(config)
        del config["hydra"]
    train.main(config)
    return json.loads((run_dir / "summary.json").read_text())


KEYS = [
    "schema_version",
    "status",
    "ended",
    "error",
    "starts",
    "config",
    "versions",
    "hardware",
    "seed",
    "steps",
    "tokens",
    "model",
    "data",
    "initial_val_loss",
    "val_loss",
    "val_perplexity",
    "val_loss_by_source",
    "train_loss",
    "forgetting",
    "scores",
    "history",
    "seconds",
    "tokens_per_second",
    "step_seconds",
    "peak_bytes",
    "planned_peak_bytes",
    "optimizer_state_bytes",
    "checkpoint_path",
    "export_path",
    "disk_bytes",
    "checksum",
]

LORA = ["adapter=lora", "+adapter.lora_dropout=0.2"]

QLORA = ["adapter=qlora", "optim=adamw_8bit", "module.activation_checkpointing=true"]
