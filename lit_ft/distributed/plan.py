"""What a trainer and a module are about to combine, as a plan that rules can judge."""

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
    """A refusal under the name that Lightning's users know."""


def check_run(
    trainer: Trainer,
    module: LightningModule,
    *,
    parts: Collection[Part] = PARTS,
    **changes: Any,
) -> Plan:
    """Return what the run combines, if it goes together.

    Args:
        trainer: the trainer, set up or not.
        module: the module that it will train.
        parts: whose rules are asked, see `lit_ft.compat.rules.refusals`.
        **changes: fields of the plan that are known better by now.

    Raises:
        Misconfiguration: Something does not go together; names what does.
    """
    plan = replace(plan_of(trainer, module), **changes)
    for refusal in refusals(plan, parts=parts):
        raise Misconfiguration(refusal.why, *refusal.remedies)
    return plan


def plan_of(trainer: Trainer, module: LightningModule) -> Plan:
    """Return what the trainer, its callbacks and the module combine.

    Of a module in another project less is known before it has built its optimizer; what is not
    known is not refused.

    Args:
        trainer: the trainer, set up or not.
        module: the module, which may be a `PlansAhead`, as `CausalLMModule` is.
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
