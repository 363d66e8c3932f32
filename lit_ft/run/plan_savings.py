"""Find the settings with which a planned run takes less memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lit_ft.run.arguments import composed
from lit_ft.run.override import name_of
from lit_ft.run.plan import planned
from lit_ft.run.planned_run import PlannedRun
from lit_ft.terminal.console import format_bytes
from lit_ft.terminal.display import stage

_WORTH = 0.02  # of the peak: a setting that saves less is not shown


def savings(arguments: Sequence[str], run: PlannedRun) -> Iterator[tuple[str, str]]:
    """Yield the settings that make a run take less, each alone, with the bytes that it saves.

    Settings that the rules refuse together with the others are left out.

    Args:
        arguments: The arguments of the run.
        run: Its plan.
    """
    for settings in _others(run.config):
        with stage(f"planning with {' '.join(settings)}"):
            try:
                smaller = planned(composed(replaced(arguments, settings)))
            except ValueError:
                continue
        saved = run.plan.peak_bytes - smaller.plan.peak_bytes
        if saved > _WORTH * run.plan.peak_bytes:
            yield " ".join(settings), format_bytes(saved)


def _others(config: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield settings that usually save memory, and that a configuration does not have yet."""
    data, trainer = config["data"], config["trainer"]
    if not config["module"].get("activation_checkpointing"):
        yield ["module.activation_checkpointing=true"]
    rows, micro_batches = data["batch_size"], trainer["accumulate_grad_batches"]
    if rows > 1:
        yield ["data.batch_size=1", f"trainer.accumulate_grad_batches={rows * micro_batches}"]
    callbacks = " ".join(one["_target_"] for one in trainer["callbacks"] or [])
    if "LayerwiseUpdate" not in callbacks and "BlockUpdate" not in callbacks:
        yield ["update=layerwise", "trainer.gradient_clip_val=null"]
    elif "LayerwiseUpdate" in callbacks and trainer["gradient_clip_val"]:
        yield ["trainer.gradient_clip_val=null"]
    if config.get("adapter") is None:
        if config.get("galore") is None or "8bit" not in config["optim"]["_target_"].lower():
            yield ["optim=galore_subspace_8bit"]
        yield ["adapter=lora", "optim=adamw_lora"]
    elif config["model"].get("quantization_config") is None:
        yield ["adapter=qlora"]


def replaced(arguments: Sequence[str], settings: Sequence[str]) -> list[str]:
    """Return the arguments with settings in place of those of the same names."""
    names = {setting.partition("=")[0] for setting in settings}
    kept = [one for one in arguments if name_of(one) not in names]
    return [*kept, *settings]
