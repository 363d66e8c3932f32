"""Plan the memory of the run that a configuration describes, without running it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from lit_ft.measure.cards import Card, card
from lit_ft.measure.memory_plan import MemoryPlan
from lit_ft.run.fake_run import num_ranks, plan_run
from lit_ft.run.plan_verdict import Outside, Verdict, verdict


@dataclass(frozen=True)
class PlannedRun:
    """A run and the plan of its memory.

    Attributes:
        config: The resolved configuration.
        plan: The plan of each device.
        outside: The memory that a device needs in addition to tensors.
        card: The card that the run is planned for; None for none.
        facts: What is planned, keyed by what it is about.
    """

    config: dict[str, Any]
    plan: MemoryPlan
    outside: Outside
    card: Card | None
    facts: dict[str, str]

    @property
    def verdict(self) -> Verdict | None:
        """Whether the run fits on the card; None without a card."""
        return None if self.card is None else verdict(self.plan, self.outside, self.card)


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
    data, micro_batches = config["data"], trainer["accumulate_grad_batches"]
    geometry = f"{data['batch_size']} rows of {data['max_length']:,} tokens, all of them learnt"
    if micro_batches > 1:
        geometry = f"{micro_batches} micro-batches of {geometry}"
    kind = "CPU" if on_cpu else (card.name if card and card.name else "GPU")
    facts = {
        "model": f"{_name(config)}, {plan.blocks} blocks",
        "device": f"{ranks} × {kind}" if ranks > 1 else kind,
        "precision": trainer["precision"],
        "batch": geometry,
    }
    outside = Outside.of(plan, device_type=device_type, ranks=ranks)
    return PlannedRun(config, plan, outside, card, facts)


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


def _name(config: Mapping[str, Any]) -> str:
    model = config["model"]
    return str(model.get("name") or model.get("name_or_path") or model.get("_target_"))
