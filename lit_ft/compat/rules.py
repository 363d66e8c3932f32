"""Rules for what does not work together: each gives a reason and remedies."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from lit_ft.compat import remedies
from lit_ft.compat.optimizers import traits_named
from lit_ft.compat.plan import BASES, Adapter, Plan
from lit_ft.compat.refusal import Refusal, Remedy

Part = Literal["module", "galore", "layerwise", "blocks", "batch size"]
PARTS: tuple[Part, ...] = ("module", "galore", "layerwise", "blocks", "batch size")


Ask = Callable[[Plan], Refusal | None]


class _Rule(NamedTuple):
    part: Part
    ask: Ask


_RULES: list[_Rule] = []


def refusals(plan: Plan, *, parts: Collection[Part] = PARTS) -> Iterator[Refusal]:
    """Yield every reason why the plan cannot work.

    Args:
        plan: The plan to check.
        parts: The parts of lit_ft whose rules to apply: its module, and its callbacks for GaLore,
            layerwise updates, block updates and the batch size. If one of these callbacks runs with
            another project's module, it checks only its own part.
    """
    for rule in _RULES:
        if rule.part in parts and (refusal := rule.ask(plan)) is not None:
            yield Refusal(refusal.why, *_cures(rule, plan, refusal.remedies))


def check(plan: Plan, *, parts: Collection[Part] = PARTS) -> None:
    """Raise the first reason why the plan cannot work, if there is one.

    Args:
        plan: The plan to check.
        parts: The parts of lit_ft whose rules to apply; see `refusals`.

    Raises:
        Refusal: If a rule refuses the plan. The error carries the remedies.
    """
    for refusal in refusals(plan, parts=parts):
        raise refusal


def goes(plan: Plan) -> bool:
    """Return whether the plan can work, which means that no rule refuses it."""
    return all(rule.ask(plan) is None for rule in _RULES)


def _cures(rule: _Rule, plan: Plan, usual: Sequence[Remedy]) -> Sequence[Remedy]:
    """Leave out remedies after which the rule would refuse the plan again, unless none is left."""
    cures = [
        remedy
        for remedy in usual
        if not _PLANNED.intersection(remedy.settings) or rule.ask(after(plan, remedy)) is None
    ]
    return cures or usual


def after(plan: Plan, remedy: Remedy) -> Plan:
    """Return the plan with a remedy's settings; settings that no plan has are ignored."""
    changes: dict[str, Any] = {}
    for name, value in remedy.settings.items():
        if name == "optim":
            base, galore = remedies.PRESETS.get(value, (value, "none"))
            changes |= _optimizer(base) | {"basis": BASES.get(galore)}
        elif name == "galore":
            changes["basis"] = BASES.get(value)
        elif name == "strategy":
            changes["parallel"] = {"hsdp": "fsdp", "single_gpu": "single"}.get(value, value)
        elif name == "update":
            changes |= {"layerwise": value == "layerwise", "blocks": value == "blocks"}
            changes["drops_state"] = value == "blocks"
        elif name == "adapter":
            changes |= {"adapter": None, "quantised": value == "qlora"}
            if value != "none":  # the choice of an adapter includes its optimizer
                changes |= {"adapter": Adapter(), "basis": None} | _optimizer("adamw")
        elif name in _TRAINER:
            field, becomes = _TRAINER[name]
            changes[field] = becomes if becomes is not None else value
    return replace(plan, **changes)


def _optimizer(choice: str) -> dict[str, Any]:
    name = remedies.OPTIMIZERS[choice][0]
    return {"optimizer": name.rpartition(".")[2], "traits": traits_named(name)}


_TRAINER: dict[str, tuple[str, Any]] = {
    "trainer.gradient_clip_val": ("clip", "none"),
    "trainer.precision": ("precision", None),
    "module.compile": ("compiled", False),
    "callbacks.blocks.state": ("drops_state", False),
}
_PLANNED = {"optim", "galore", "strategy", "update", "adapter", *_TRAINER}


def _about(
    part: Part,
) -> Callable[[Callable[[Plan], Refusal | None]], Callable[[Plan], Refusal | None]]:
    def register(ask: Callable[[Plan], Refusal | None]) -> Callable[[Plan], Refusal | None]:
        _RULES.append(_Rule(part, ask))
        return ask

    return register


def _others(plan: Plan) -> list[Remedy]:
    """Return remedies that switch to a suitable optimizer and keep the run's choice of GaLore."""
    galore = plan.basis.choice if plan.basis else None
    return [remedies.optimizer(choice, galore=galore) for choice in plan.traits.instead]


# GaLore ---------------------------------------------------------------------------------------


@_about("galore")
def _galore_or_adapter(plan: Plan) -> Refusal | None:
    if plan.basis is None or plan.adapter is None:
        return None
    return Refusal(
        "An adapter's few weights need no subspace",
        remedies.ADAPTER_NONE,
        remedies.NO_GALORE,
    )


@_about("galore")
def _galore_needs_a_known_strategy(plan: Plan) -> Refusal | None:
    if plan.basis is None or plan.parallel != "other":
        return None
    return Refusal(
        f"GaLore trains on one device, under DDP and under FSDP2, not under {plan.strategy}",
        remedies.FSDP,
        remedies.DDP,
    )


@_about("galore")
def _galore_needs_whole_layers(plan: Plan) -> Refusal | None:
    if plan.basis is None or plan.parallel != "tensor":
        return None
    return Refusal(
        "GaLore works with sharded data parallelism, not with tensor parallelism, which cuts its "
        "layers",
        remedies.FSDP,
        remedies.NO_GALORE,
    )


@_about("galore")
def _galore_steps_from_zero(plan: Plan) -> Refusal | None:
    if plan.basis is None or plan.traits.works_from_zero:
        return None
    return Refusal(
        "This optimizer cannot step GaLore's parameters, which are zero before each step: "
        f"{plan.traits.why}",
        *_others(plan),
        remedies.NO_GALORE,
    )


@_about("galore")
def _galore_rewrites_state(plan: Plan) -> Refusal | None:
    if plan.basis is None or plan.traits.movable_state:
        return None
    return Refusal(
        f"The optimizer's state must follow a basis that moves: {plan.traits.why}",
        *_others(plan),
    )


@_about("galore")
def _galore_is_float32(plan: Plan) -> Refusal | None:
    if plan.basis is None or not plan.sharded or plan.precision != "bf16-true":
        return None
    return Refusal(
        "FSDP2 needs one dtype within a block, and GaLore's small parameters are float32 even if "
        "the weights are bfloat16",
        remedies.BF16_MIXED,
    )


@_about("galore")
def _bases_from_gradients(plan: Plan) -> Refusal | None:
    if plan.basis is None or not plan.basis.forms_gradients:
        return None
    projector, others = (
        plan.basis.projector,
        (
            remedies.RENEWED_BASES,
            remedies.SMALL_MOVES,
        ),
    )
    if plan.sharded:
        return Refusal(
            f"{projector} computes bases from whole gradients, and no rank has one where weights "
            "are sharded",
            *others,
            remedies.DDP,
        )
    if plan.scales_loss:
        return Refusal(
            f"{projector} computes bases from whole gradients, which the gradient scaler of "
            f"precision {plan.precision} does not unscale",
            *others,
            remedies.BF16_MIXED,
        )
    return None


@_about("galore")
def _rate_finder_knows_no_galore(plan: Plan) -> Refusal | None:
    if plan.basis is None or not plan.finds_rate:
        return None
    return Refusal(
        "Lightning's learning rate finder trains without callbacks, and without the GaLore "
        "callback the parameters of GaLore move no weight",
        Remedy("find the rate without GaLore, since the same rate suits GaLore"),
    )


@_about("galore")
def _copies_come_after_galore(plan: Plan) -> Refusal | None:
    if plan.basis is None or plan.copied_before_galore is None:
        return None
    name = plan.copied_before_galore
    return Refusal(
        f"{name} copies the module before GaLore changes it",
        Remedy(f"list GaLore before {name}"),
    )


# Layerwise updates ----------------------------------------------------------------------------


@_about("layerwise")
def _layerwise_is_automatic(plan: Plan) -> Refusal | None:
    if not plan.layerwise or not plan.optimizes_by_hand:
        return None
    return Refusal(
        f"LayerwiseUpdate needs automatic optimization, and {plan.module} optimizes by hand",
        Remedy("use lit_ft.optim.layerwise.LayerwiseStep there"),
    )


@_about("layerwise")
def _layerwise_not_under_ddp(plan: Plan) -> Refusal | None:
    if not plan.layerwise or plan.parallel != "ddp":
        return None
    return Refusal(
        f"Layerwise updates save nothing under {plan.strategy}, whose buckets keep every gradient, "
        "and ranks would drift apart",
        remedies.FSDP,
        remedies.WHOLE_UPDATE,
    )


@_about("layerwise")
def _layerwise_needs_a_known_strategy(plan: Plan) -> Refusal | None:
    if not plan.layerwise or plan.parallel != "other":
        return None
    return Refusal(
        f"Layerwise updates run on one device or under FSDP2, not under {plan.strategy}",
        remedies.WHOLE_UPDATE,
    )


@_about("layerwise")
def _layerwise_cannot_skip(plan: Plan) -> Refusal | None:
    if not plan.layerwise or not plan.skips_steps:
        return None
    return Refusal(
        "A step cannot be skipped under layerwise updates, which have moved some parameters before "
        "the last gradient is known",
        remedies.WHOLE_UPDATE,
        remedies.STOP_AT_FIRST,
    )


@_about("layerwise")
def _layerwise_clips_twice(plan: Plan) -> Refusal | None:
    if not plan.layerwise or not plan.sharded or plan.clip != "norm":
        return None
    return Refusal(
        "Layerwise updates clip by norm in a second backward pass, and sharded weights allow only "
        "one pass",
        remedies.NO_CLIPPING,
        remedies.WHOLE_UPDATE,
    )


@_about("layerwise")
def _layerwise_leaves_nothing_to_clip(plan: Plan) -> Refusal | None:
    if not plan.layerwise or not plan.clips_its_own_way:
        return None
    return Refusal(
        f"{plan.module} clips in its own way, and layerwise updates leave it no gradients to clip",
        remedies.WHOLE_UPDATE,
    )


@_about("layerwise")
def _layerwise_back_propagates_twice(plan: Plan) -> Refusal | None:
    if not plan.layerwise or plan.clip != "norm" or not plan.back_propagates_its_own_way:
        return None
    return Refusal(
        f"{plan.module} back-propagates in its own way, and clipping by norm must do so twice",
        remedies.WHOLE_UPDATE,
        remedies.NO_CLIPPING,
    )


@_about("layerwise")
def _layerwise_steps_one_parameter(plan: Plan) -> Refusal | None:
    if not plan.layerwise or plan.traits.per_parameter:
        return None
    return Refusal(
        f"Layerwise updates step one parameter at a time: {plan.traits.why}",
        remedies.WHOLE_UPDATE,
        *_others(plan),
    )


# Block updates --------------------------------------------------------------------------------


@_about("blocks")
def _blocks_or_galore(plan: Plan) -> Refusal | None:
    if not plan.blocks or plan.basis is None:
        return None
    return Refusal(
        "Block updates train a few blocks at a time, and GaLore trains all of them in subspaces",
        remedies.NO_GALORE,
        remedies.NO_BLOCKS,
    )


@_about("blocks")
def _blocks_or_adapter(plan: Plan) -> Refusal | None:
    if not plan.blocks or plan.adapter is None:
        return None
    return Refusal(
        "An adapter's few weights need no turns",
        remedies.ADAPTER_NONE,
        remedies.NO_BLOCKS,
    )


@_about("blocks")
def _blocks_are_automatic(plan: Plan) -> Refusal | None:
    if not plan.blocks or not plan.optimizes_by_hand:
        return None
    return Refusal(
        f"BlockUpdate needs automatic optimization, and {plan.module} optimizes by hand",
        Remedy("use lit_ft.optim.blocks.BlockTurns there"),
    )


@_about("blocks")
def _blocks_not_under_ddp(plan: Plan) -> Refusal | None:
    if not plan.blocks or plan.parallel != "ddp":
        return None
    return Refusal(
        f"Block updates save no gradients under {plan.strategy}, whose buckets are made once for "
        "all parameters and wait for each of them",
        remedies.FSDP,
        remedies.NO_BLOCKS,
    )


@_about("blocks")
def _blocks_need_a_known_strategy(plan: Plan) -> Refusal | None:
    if not plan.blocks or plan.parallel != "other":
        return None
    return Refusal(
        f"Block updates run on one device, under FSDP2 and with tensor parallelism, not under "
        f"{plan.strategy}",
        remedies.NO_BLOCKS,
    )


@_about("blocks")
def _blocks_not_compiled(plan: Plan) -> Refusal | None:
    if not plan.blocks or not plan.compiled:
        return None
    return Refusal(
        "torch.compile compiles a model for the weights that are trained, and block updates change "
        "them again and again",
        remedies.NOT_COMPILED,
        remedies.NO_BLOCKS,
    )


@_about("blocks")
def _blocks_step_some_parameters(plan: Plan) -> Refusal | None:
    if not plan.blocks or plan.traits.per_parameter:
        return None
    return Refusal(
        f"Block updates step some parameters and not the others: {plan.traits.why}",
        remedies.NO_BLOCKS,
        *_others(plan),
    )


@_about("blocks")
def _blocks_free_state(plan: Plan) -> Refusal | None:
    if not plan.blocks or not plan.drops_state or plan.traits.frees_state:
        return None
    return Refusal(
        f"The optimizer's state of a block cannot be freed: {plan.traits.why}",
        *_others(plan),
        remedies.KEPT_STATE,
    )


@_about("batch size")
def _batch_size_on_one_device(plan: Plan) -> Refusal | None:
    if not plan.finds_batch_size or plan.devices == 1:
        return None
    return Refusal(
        "AutoBatchSize measures one device",
        Remedy(
            "run it once with Trainer(devices=1) and pass the batch size that it finds",
            advice="run it once with trainer.devices=1 and pass the data.batch_size that it finds",
        ),
    )


# The module -----------------------------------------------------------------------------------


@_about("module")
def _no_float16_weights(plan: Plan) -> Refusal | None:
    if plan.precision != "16-true":
        return None
    return Refusal(
        "float16 weights lose small updates and overflow", remedies.BF16_TRUE, remedies.FP16_MIXED
    )


@_about("module")
def _sharding_is_defined(plan: Plan) -> Refusal | None:
    if plan.parallel != "undefined":
        return None
    return Refusal("ModelParallelStrategy does not say how the model is sharded", remedies.FSDP)


@_about("module")
def _tensor_parallel_steps_elements(plan: Plan) -> Refusal | None:
    if plan.parallel != "tensor" or not plan.optimizer or plan.traits.elementwise:
        return None
    return Refusal(
        "Tensor parallelism cuts matrices by rows and columns, so the optimizer must step each "
        "element by itself",
        remedies.optimizer("adamw"),
        remedies.optimizer("sgd"),
        remedies.FSDP,
    )


@_about("module")
def _fsdp_steps_rows(plan: Plan) -> Refusal | None:
    if plan.parallel != "fsdp" or plan.traits.sharded_rows:
        return None
    return Refusal(
        f"Under FSDP2 a rank holds some rows of each parameter: {plan.traits.why}",
        *_others(plan),
        remedies.DDP,
    )


# LoRA options that work without whole weights: they neither read nor change base weights, and train
# no copy of one.
_WORK_SHARDED = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "runtime_config", "r", "lora_alpha", "lora_dropout"),
    *("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "fan_in_fan_out", "use_rslora", "use_dora"),
}
_START_SHARDED = (True, False, "gaussian", "orthogonal")


@_about("module")
def _sharded_adapters(plan: Plan) -> Refusal | None:
    adapter = plan.adapter
    if adapter is None or not plan.sharded:
        return None
    if plan.parallel == "tensor":
        return Refusal(
            "Tensor parallelism cuts the layers that an adapter sits on",
            remedies.DDP,
            remedies.ADAPTER_NONE,
        )
    others = (remedies.LORA, remedies.DDP)
    if plan.quantised:
        return Refusal("Quantised weights cannot be sharded", *others)
    if adapter.kind != "LoraConfig":
        return Refusal("Of peft's adapters, LoRA alone works on sharded weights", *others)
    if adapter.init not in _START_SHARDED:
        return Refusal(
            f"init_lora_weights={adapter.init} starts from whole weights, and no rank has one "
            "where they are sharded",
            *others,
        )
    if unknown := sorted(adapter.options - _WORK_SHARDED):
        return Refusal(f"The adapter's {unknown[0]} does not work on sharded weights", *others)
    return None


@_about("module")
def _sharded_not_compiled(plan: Plan) -> Refusal | None:
    if not plan.compiled or not plan.sharded:
        return None
    return Refusal(
        "torch.compile does not work with sharded weights", remedies.NOT_COMPILED, remedies.DDP
    )
