"""The files that a memory plan leaves in the folder of its run."""

from __future__ import annotations

from pathlib import Path

from lit_ft.measure.memory_picture import Limit, Phase, write_picture
from lit_ft.run.files import PLAN, PLAN_PICTURE
from lit_ft.run.planned_run import PlannedRun
from lit_ft.storage.json_file import write_json
from lit_ft.terminal.console import format_bytes

_NAMES = {"between": "between steps"}


def write_plan(run: PlannedRun, folder: str | Path) -> None:
    """Write a plan as `plan.json`, and as the picture `plan.html`.

    Args:
        run: The run that is planned.
        folder: The folder to write to, which is created if it is missing.
    """
    write_json(Path(folder) / PLAN, run.to_dict(), indent=2)
    outside, card = run.outside, run.card
    limit = None
    if card is not None:
        nbytes = card.memory_bytes
        left = (nbytes - outside.high, nbytes - outside.low)
        limit = Limit(card.name or "this size of card", nbytes, left)
    facts = {
        **run.facts,
        "peak": f"{format_bytes(run.plan.peak_bytes)} of tensors, in {run.plan.peak_phase}",
        "in addition": f"{format_bytes(outside.low)} to {format_bytes(outside.high)}, for the "
        "driver and the libraries",
    }
    if limit is not None:
        facts["verdict"] = f"{run.verdict}: {limit.name} has {format_bytes(limit.nbytes)}"
    phases = [Phase(_NAMES.get(name, name), [held]) for name, held in run.plan.by_phase.items()]
    title = "The memory that each device is planned to take"
    write_picture(Path(folder) / PLAN_PICTURE, title, phases, facts=facts, limit=limit)
