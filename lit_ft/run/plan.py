"""Plan the memory of the run that a configuration describes, without running it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import psutil
import torch

from lit_ft.measure.cards import Card, card
from lit_ft.run.fake_run import num_ranks, plan_run
from lit_ft.run.planned_run import PlannedRun


def planned(config: dict[str, Any]) -> PlannedRun:
    """Plan the run of a configuration on the card in `plan.gpu`, on this machine's, or on any.

    Args:
        config: The resolved configuration of `train.py`. It must name only trusted classes.

    Raises:
        ValueError: If a setting is wrong, if the card or the number of devices is not known, or if
            the settings do not work together.
    """
    trainer = dict(config["trainer"])
    config = {**config, "trainer": trainer}
    on_cpu = trainer["accelerator"] == "cpu"
    card, count = _card_in(config["plan"]["gpu"])
    if on_cpu and card is not None:
        raise ValueError(
            "plan.gpu names a card, and strategy=cpu uses none: leave out one of them."
        )
    if count is not None:
        trainer["devices"] = count
    if trainer["devices"] in ("auto", -1, "-1"):
        raise ValueError(
            "trainer.devices=auto depends on the machine: give the number of devices, such as "
            "trainer.devices=2."
        )
    device_type = "cpu" if on_cpu else "cuda"
    if card is None:
        card = _of_this_machine(device_type)
    ranks = num_ranks(trainer)
    if trainer["precision"] is None:
        trainer["precision"] = _precision(device_type, card, sharded=_shards(trainer))
    plan = plan_run(config, device_type=device_type)
    return PlannedRun(config, plan, device_type, card, ranks)


def card_of(config: Mapping[str, Any]) -> tuple[Card, int]:
    """Return the card to train on and the number of devices, from `plan.gpu` or this machine.

    Raises:
        ValueError: If neither names a card.
    """
    found, count = _card_in(config["plan"]["gpu"])
    found = found or _of_this_machine("cuda")
    if found is None:
        raise ValueError("This machine has no GPU: name a card, such as plan.gpu=24GB.")
    return found, count or num_ranks(config["trainer"])


def _card_in(text: Any) -> tuple[Card | None, int | None]:
    """Return the card that `plan.gpu` names, and how many, as in "8x80GB"."""
    if text is None:
        return None, None
    found = re.fullmatch(r"(?:(\d+)\s*[x×]\s*)?(.+)", str(text).strip())
    count, name = found.groups() if found else (None, str(text))
    try:
        return card(name), None if count is None else int(count)
    except ValueError as error:
        raise ValueError(f"plan.gpu={error}") from error


def _of_this_machine(device_type: str) -> Card | None:
    if device_type == "cpu":
        return Card("The memory of this machine", psutil.virtual_memory().total)
    if not torch.cuda.is_available():
        return None
    device = torch.cuda.get_device_properties(0)
    return Card(device.name, device.total_memory)


def _precision(device_type: str, card: Card | None, *, sharded: bool) -> str:
    """Return the precision that `train.py` would choose."""
    if device_type == "cpu":
        return "32-true"
    if card is not None and not card.has_bfloat16:
        return "32-true" if sharded else "16-mixed"
    return "bf16-mixed" if sharded else "bf16-true"


def _shards(trainer: Mapping[str, Any]) -> bool:
    strategy = trainer.get("strategy")
    return isinstance(strategy, Mapping) and "FSDP" in str(strategy.get("_target_"))
