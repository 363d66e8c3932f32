"""Collect the plan of a run from its trainer, callbacks and module, and check it."""

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
    """A `Refusal` that is also Lightning's `MisconfigurationException`."""


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
        parts: The parts of lit_ft whose rules to apply; see `lit_ft.compat.rules.refusals`.
        **changes: New values for fields of the plan, where the caller knows more than `plan_of`.

    Raises:
        Misconfiguration: If the plan cannot work. The message gives the reason and the remedies.
    """
    plan = replace(plan_of(trainer, module), **changes)
    for refusal in refusals(plan, parts=parts):
        raise Misconfiguration(refusal.why, *refusal.remedies)
    return plan


def plan_of(trainer: Trainer, module: LightningModule) -> Plan:
    """Return the plan of a run, as its trainer, callbacks and module describe it.

    If the module has no method `plan_facts`, the plan says nothing about its optimizer, adapter and
    model. Fields that are not known keep their defaults, which no rule refuses.

    Args:
        trainer: The trainer, set up or not.
        module: The module to train. If it has a method `plan_facts`, as `CausalLMModule` has, the
            plan contains what that method returns.
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
