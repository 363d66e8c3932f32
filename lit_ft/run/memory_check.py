"""Hold the memory plan of a run against its device, before the weights load if it can matter."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_ft.callbacks import StartTable
from lit_ft.callbacks._support.trainer import find_callback
from lit_ft.compat.refusal import Remedy
from lit_ft.distributed.plan import Misconfiguration
from lit_ft.measure.live_memory import USES
from lit_ft.measure.memory_plan import MemoryPlan
from lit_ft.run.background_plan import BackgroundPlan
from lit_ft.run.override import name_of
from lit_ft.run.plan_files import write_plan
from lit_ft.run.plan_verdict import cannot_fit
from lit_ft.run.planned_run import PlannedRun
from lit_ft.run.rough_memory import RoughMemory, rough_memory
from lit_ft.run.summary import RunSummary
from lit_ft.run.to_plan import ToPlan, to_plan
from lit_ft.terminal import stage as shown_stage
from lit_ft.terminal.console import format_bytes

_PATIENCE = 60.0  # seconds: a plan that takes longer is not waited for
# Settings that are not about the memory, and those of this check.
_NOT_PASSED_ON = {"run_dir", "resume", "overwrite", "ui", "plan.check", "plan.gpu"}

log = logging.getLogger(__name__)


class MemoryCheck(Callback):
    """Shows, records and writes the memory plan of a run, and refuses a run that cannot fit.

    A run that cannot be planned goes on without a plan, and its log says why.

    Args:
        planning: The process that plans, which has not been asked yet.
        summary: The summary of the run, which gets the plan.
        arguments: The arguments of the run, for the command in a refusal.
    """

    def __init__(
        self, planning: BackgroundPlan, summary: RunSummary, arguments: Sequence[str]
    ) -> None:
        self.planning = planning
        self.summary = summary
        self.arguments = arguments
        self._run: ToPlan | None = None
        self._rough: RoughMemory | None = None
        self._planned: PlannedRun | None = None
        self._is_written = False
        self._trains = False

    def begin(self, config: Mapping[str, Any]) -> None:
        """Ask for the plan, and wait for it if weights, gradients and state may not fit.

        Args:
            config: The resolved configuration, with the accelerator and the precision of the run.

        Raises:
            Misconfiguration: If the run cannot fit, whatever its rows are.
        """
        if not self.planning.is_under_way:
            return
        try:
            run = to_plan(config)
            rough = rough_memory(run.config)
            self.planning.ask(run.config, device_type=run.device_type)
        except Exception as error:  # the run itself says what is wrong with its settings
            self._give_up(f"{type(error).__name__}: {error}")
            return
        self._run, self._rough = run, rough
        if rough.weights > run.card.memory_bytes:
            raise self._refusal(f"The weights alone take {format_bytes(rough.weights)}")
        if rough.without_rows > run.card.memory_bytes:
            self._look(wait=True)
        else:
            self.planning.give_way()
        if self._planned is not None:
            phases, held = self._planned.plan.peak_by_phase, self._planned.plan.held_bytes
            without_rows = [phases.get("load", 0), phases.get("step", 0), sum(held.values())]
            self._stop_beyond(max(without_rows))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a run that cannot fit with its rows: they are known, and no weights are loaded."""
        if self._trains:
            return  # for the validation after training
        if self._run is not None and self._rough is not None:
            self._look(wait=self._rough.at_most > self._run.card.memory_bytes)
            self._stop_with_rows(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the table at the start show the plan, if there is one by now."""
        self._look()
        table = find_callback(trainer, StartTable)
        if table is not None and self._planned is not None:
            table.facts["memory"] = self._told()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a run that cannot fit, at the last point at which nothing is lost."""
        if self._look():
            self._stop_with_rows(trainer)
            self._say()
        self._trains = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show a plan that comes late, and write it once the folder is this run's own."""
        if self._look():
            self._say()
        self._write()

    def _look(self, *, wait: bool = False) -> bool:
        """Take the answer if there is one; return whether it is a plan, and has just come."""
        if not self.planning.is_under_way or self._run is None:
            return False
        answer = self.planning.answer()
        if answer is None and wait:
            with shown_stage("planning the memory"):
                answer = self.planning.answer(timeout=_PATIENCE)
        if answer is None:
            return False
        if "plan" not in answer:
            self._give_up(answer["why_not"])
            return False
        run, plan = self._run, MemoryPlan(**answer["plan"])
        self._planned = PlannedRun(run.config, plan, run.device_type, run.card, run.ranks)
        outside = self._planned.outside
        self.summary.update(
            planned_peak_bytes={
                "value": plan.peak_bytes,
                "outside_low": outside.low,
                "outside_high": outside.high,
                "by_category": plan.by_category,
            }
        )
        self._write()
        return True

    def _write(self) -> None:
        if self._planned is not None and self.summary.is_open and not self._is_written:
            write_plan(self._planned, self.summary.run_dir)
            self._is_written = True

    def _give_up(self, why: str) -> None:
        self.planning.close()
        log.info("There is no memory plan of this run: %s", why)

    def _say(self) -> None:
        rank_zero_info(f"memory: {self._told()}")

    def _told(self) -> str:
        """Return the plan and the memory that there is, in a line."""
        assert self._planned is not None and self._run is not None
        plan, outside = self._planned.plan, self._planned.outside
        low, high = (plan.peak_bytes + more for more in (outside.low, outside.high))
        return (
            f"{format_bytes(low)} to {format_bytes(high)} are planned, for rows of "
            f"{self._run.config['data']['max_length']:,} tokens; {self._run.card.name} has "
            f"{format_bytes(self._run.card.memory_bytes)}"
        )

    def _stop_with_rows(self, trainer: Trainer) -> None:
        """Refuse a run whose planned rows cannot fit, if some row is as long as those planned."""
        if self._planned is None or self._run is None:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]  # set outside __init__
        settings = self._run.config["data"]
        if data.streaming:
            return  # how long its rows are is not known
        if settings["packing"] or data.longest_example() >= settings["max_length"]:
            self._stop_beyond(self._planned.plan.peak_bytes)

    def _stop_beyond(self, nbytes: int) -> None:
        assert self._planned is not None and self._run is not None
        plan, outside = self._planned.plan, self._planned.outside
        if not cannot_fit(nbytes, outside, self._run.card):
            return
        largest, size = max(plan.by_category.items(), key=lambda use: use[1])
        raise self._refusal(
            f"It takes {format_bytes(plan.peak_bytes)} of tensors at its peak, and at least "
            f"{format_bytes(outside.low)} more. The largest part is {USES[largest]}, "
            f"{format_bytes(size)}"
        )

    def _refusal(self, why: str) -> Misconfiguration:
        assert self._run is not None
        card = self._run.card
        each = "each " if self._run.ranks > 1 and self._run.device_type != "cpu" else ""
        return Misconfiguration(
            f"This run cannot fit: {each}{card.name} has {format_bytes(card.memory_bytes)}. {why}",
            Remedy(f"see what takes less with `{self._command()}`"),
            Remedy("try it all the same", advice="try it all the same with plan.check=false"),
        )

    def _command(self) -> str:
        """Return the command that shows what takes less."""
        assert self._run is not None
        kept = [one for one in self.arguments if name_of(one) not in _NOT_PASSED_ON]
        if self._run.device_type == "cuda":
            kept.insert(0, "recommend=true")
        elif not {"strategy=cpu", "trainer.accelerator=cpu"} & set(kept):
            kept.append("trainer.accelerator=cpu")
        return f"python -m lit_ft.plan {shlex.join(kept)}"
