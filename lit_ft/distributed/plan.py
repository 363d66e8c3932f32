"""The plan of a run: what its trainer, callbacks and module combine, for the rules to check."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import GradClipAlgorithmType

from lit_ft.compat.plan import Plan, parallel_of
from lit_ft.compat.protocols import PlansAhead
from lit_ft.compat.refusal import Refusal
from lit_ft.compat.rules import PARTS, Part, refusals


class Misconfiguration(MisconfigurationException, Refusal):
    """A refusal as the exception that Lightning's users know."""


def check_run(
    trainer: Trainer,
    module: LightningModule,
    *,
    parts: Collection[Part] = PARTS,
    **changes: Any,
) -> Plan:
    """Return the plan of a run, after checking that it can work.

    Args:
        trainer: The trainer, set up or not.
        module: The module that the trainer will train.
        parts: The parts of the run whose rules are checked; see `lit_ft.compat.rules.refusals`.
        **changes: Fields of the plan to replace, because they are known better now.

    Raises:
        Misconfiguration: If the plan cannot work. Names the reason and the remedies.
    """
    plan = replace(plan_of(trainer, module), **changes)
    for refusal in refusals(plan, parts=parts):
        raise Misconfiguration(refusal.why, *refusal.remedies)
    return plan


def plan_of(trainer: Trainer, module: LightningModule) -> Plan:
    """Return the plan of what the trainer, its callbacks and the module combine.

    Less is known of another project's module before it has built its optimizer. Nothing is refused
    that is not known.

    Args:
        trainer: The trainer, set up or not.
        module: The module to train, which may be a `PlansAhead`, as `CausalLMModule` is.
    """
    strategy = type(trainer.strategy)
    facts: dict[str, Any] = {
        "parallel": parallel_of(strategy),
        "strategy": strategy.__name__,
        "devices": trainer.world_size,
        "clip": _clip(trainer),
        "accumulate": trainer.accumulate_grad_batches,
        "precision": str(trainer.precision),
        "scales_loss": getattr(trainer.precision_plugin, "scaler", None) is not None,
        "module": type(module).__name__,
    }
    for part in (module, *trainer.callbacks):  # type: ignore[attr-defined]  # set outside __init__
        if isinstance(part, PlansAhead):
            facts |= part.plan_facts(trainer, module)
    return Plan(**facts)


def _clip(trainer: Trainer) -> str:
    if not trainer.gradient_clip_val:
        return "none"
    by_value = trainer.gradient_clip_algorithm is GradClipAlgorithmType.VALUE
    return "value" if by_value else "norm"
