"""A run with the plan of its memory, as the terminal and `plan.json` show it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lit_ft.measure.cards import Card
from lit_ft.measure.memory_plan import MemoryPlan
from lit_ft.run.plan_verdict import Outside, Verdict, verdict
from lit_ft.terminal.console import format_count


@dataclass(frozen=True)
class PlannedRun:
    """A run and the plan of its memory.

    Attributes:
        config: The resolved configuration, with a precision.
        plan: The plan of each device.
        device_type: The type of the devices, "cpu" or "cuda".
        card: The card that the run is planned for; None for none.
        ranks: The number of ranks.
    """

    config: Mapping[str, Any]
    plan: MemoryPlan
    device_type: str
    card: Card | None
    ranks: int

    @property
    def outside(self) -> Outside:
        """The memory that a device needs in addition to tensors."""
        return Outside.of(self.plan, device_type=self.device_type, ranks=self.ranks)

    @property
    def verdict(self) -> Verdict | None:
        """Whether the run fits on the card; None without a card."""
        return None if self.card is None else verdict(self.plan, self.outside, self.card)

    @property
    def facts(self) -> dict[str, str]:
        """What is planned, keyed by what it is about."""
        data, trainer = self.config["data"], self.config["trainer"]
        rows = format_count(data["batch_size"], "row")
        geometry = f"{rows} of {data['max_length']:,} tokens, all learnt"
        if (micro_batches := trainer["accumulate_grad_batches"]) > 1:
            geometry = f"{micro_batches} micro-batches of {geometry}"
        on_card = self.card.name if self.card and self.card.name else "GPU"
        kind = "CPU" if self.device_type == "cpu" else on_card
        return {
            "model": f"{_name(self.config['model'])}, {self.plan.blocks} blocks",
            "device": f"{self.ranks} × {kind}" if self.ranks > 1 else kind,
            "precision": trainer["precision"],
            "batch": geometry,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return what `plan.json` holds, as plain values."""
        return {
            **self.plan.to_dict(),
            "outside_bytes": asdict(self.outside),
            "verdict": self.verdict,
            "card": None if self.card is None else asdict(self.card),
            "facts": self.facts,
        }


def _name(model: Mapping[str, Any]) -> str:
    return str(model.get("name") or model.get("name_or_path") or model.get("_target_"))
