"""What a run's own memory plan is for: its device, its ranks and its batch, before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from lit_ft.measure.cards import Card
from lit_ft.run.fake_run import NO_OFFLOADING, num_ranks, offloads


@dataclass(frozen=True)
class ToPlan:
    """A run to plan.

    Attributes:
        config: The resolved configuration, with the number of devices in figures.
        device_type: The type of the devices, "cpu" or "cuda".
        card: The device that the first rank trains on, or this machine with its memory.
        ranks: The number of ranks.
    """

    config: dict[str, Any]
    device_type: str
    card: Card
    ranks: int


def to_plan(config: Mapping[str, Any]) -> ToPlan:
    """Return what to plan for a run on this machine.

    Args:
        config: The resolved configuration, with the accelerator and the precision of the run.

    Raises:
        ValueError: If a run on such devices cannot be planned, or if its batch or its number of
            devices is not known before it starts.
    """
    trainer = dict(config["trainer"])
    if any("AutoBatchSize" in str(one.get("_target_")) for one in trainer["callbacks"] or []):
        raise ValueError("The batch size is not known before the run.")
    device_type = _device_type(trainer["accelerator"])
    devices = trainer["devices"]
    if isinstance(devices, list):
        trainer["devices"] = len(devices)
    elif devices in ("auto", -1, "-1"):
        trainer["devices"] = torch.cuda.device_count() if device_type == "cuda" else 1
    elif not isinstance(devices, int):
        raise ValueError(f"The number of devices is not known before the run: {devices}.")
    if device_type == "cpu":
        card = Card("this machine", psutil.virtual_memory().total)
    else:
        if offloads(trainer):  # not even the weights have to fit on the device
            raise ValueError(NO_OFFLOADING)
        first = devices[0] if isinstance(devices, list) and devices else 0
        found = torch.cuda.get_device_properties(first)
        card = Card(found.name, found.total_memory)
    return ToPlan({**config, "trainer": trainer}, device_type, card, num_ranks(trainer))


def _device_type(accelerator: str) -> str:
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "cuda"
    if accelerator == "cpu" or (accelerator == "auto" and not torch.backends.mps.is_available()):
        return "cpu"
    raise ValueError(f"There is no plan for trainer.accelerator={accelerator} on this machine.")
