"""Which values of settings are sound, said by hand, and not read from the constructors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Check = Callable[[Any], bool]


def whole(least: int, below: float = math.inf) -> Check:
    return lambda v: type(v) is int and least <= v < below


def number(least: float = 0, most: float = math.inf, *, above: bool = False) -> Check:
    return lambda v: (
        type(v) in (int, float)
        and math.isfinite(v)
        and (least < v if above else least <= v)
        and v <= most
    )


def share(*, none_too: bool = True, whole_too: bool = True) -> Check:
    ends = (0 if none_too else None, 1 if whole_too else None)
    return lambda v: type(v) in (int, float) and (0 < v < 1 or v in ends)


def flag(v: Any) -> bool:
    return v is True or v is False


def text(v: Any) -> bool:
    return type(v) is str


def one_of(*choices: Any) -> Check:
    return lambda v: any(type(v) is type(choice) and v == choice for choice in choices)


def maybe(check: Check) -> Check:
    return lambda v: v is None or check(v)


def either(*checks: Check) -> Check:
    return lambda v: any(check(v) for check in checks)


def each(check: Check, length: int | None = None) -> Check:
    return lambda v: (
        isinstance(v, list) and length in (None, len(v)) and all(check(one) for one in v)
    )


def mapping(v: Any) -> bool:
    return isinstance(v, dict)


decay = share(whole_too=False)
batches = maybe(either(whole(0), share()))
OPTIMIZER = {"optim.lr": number(), "optim.weight_decay": number()}
ADAM = {**OPTIMIZER, "optim.betas": each(decay, 2), "optim.eps": number()}
TORCH = {"optim.fused": maybe(flag), "optim.foreach": maybe(flag), "optim.maximize": flag}

SOUND: dict[str, Check] = {
    "seed": whole(0, 2**32),
    "validate_only": flag,
    "resume": maybe(text),
    "trusted_packages": each(text),
    "checkpoint.every_n_steps": whole(1),
    "checkpoint.save_optimizer": flag,
    "module.activation_checkpointing": flag,
    "module.compile": flag,
    "loss.chunk_tokens": maybe(whole(1)),
    "loss.repeatable": flag,
    "schedule.warmup": number(),
    "data.max_length": whole(2),
    "data.batch_size": whole(1),
    "data.val_batch_size": maybe(whole(1)),
    "data.packing": flag,
    "data.group_by_length": flag,
    "data.overlong": one_of("drop", "cut", "cut_left", "split"),
    "data.train_on": either(one_of("assistant", "last", "all"), each(text)),
    "data.control_tokens": one_of("text", "keep", "refuse"),
    "data.learn_empty_think": flag,
    "data.drop_unrendered": flag,
    "data.bad_rows": one_of("stop", "skip"),
    "data.val_fraction": share(whole_too=False, none_too=False),
    "data.max_train_examples": maybe(whole(1)),
    "data.max_val_examples": maybe(whole(1)),
    "data.streaming": flag,
    "data.num_workers": whole(0),
    "data.source_options": maybe(mapping),
    "trainer.max_steps": whole(-1),
    "trainer.max_epochs": maybe(whole(-1)),
    "trainer.min_steps": maybe(whole(0)),
    "trainer.accumulate_grad_batches": whole(1),
    "trainer.gradient_clip_val": maybe(number()),
    "trainer.gradient_clip_algorithm": maybe(one_of("norm", "value")),
    "trainer.limit_train_batches": batches,
    "trainer.limit_val_batches": batches,
    "trainer.log_every_n_steps": maybe(whole(0)),
    "trainer.num_nodes": whole(1),
    "trainer.num_sanity_val_steps": maybe(whole(-1)),
    "trainer.check_val_every_n_epoch": maybe(whole(1)),
    "trainer.enable_model_summary": maybe(flag),
    "trainer.detect_anomaly": flag,
    "trainer.deterministic": maybe(either(flag, one_of("warn"))),
    "trainer.inference_mode": flag,
    "trainer.precision": maybe(one_of(16, 32, 64, "16", "32", "64", "bf16", "32-true")),
}
GALORE = {
    "galore.rank": whole(1),
    "galore.scale": either(number(0, above=True), one_of("match_adamw")),
    "galore.targets": either(text, each(text)),
    "galore.side": one_of("right", "left", "std"),
    "galore.projector.every": whole(1),
    "galore.projector.rotates_moments": flag,
    "galore.refresh.every": maybe(whole(1)),
    "galore.refresh.stagger": flag,
    "galore.refresh.adaptive": flag,
    "galore.refresh.threshold": share(),
    "galore.refresh.longest": whole(1),
    "galore.refresh.every_n_steps": maybe(whole(1)),
}
CALLBACKS = {
    "callbacks.samples.num_prompts": whole(0),
    "callbacks.samples.max_new_tokens": whole(1),
    "callbacks.samples.every_n_steps": maybe(whole(1)),
    "callbacks.throughput.skip_steps": whole(0),
    "callbacks.layerwise.min_grad_bytes": whole(0),
    "callbacks.progress.every_n_seconds": number(),
    "callbacks.memory.every_n_steps": maybe(whole(1)),
    "callbacks.export.merge": flag,
    "callbacks.export.push_to_hub": maybe(text),
    "callbacks.best_checkpoint.mode": one_of("min", "max"),
}
LORA = {
    **ADAM,
    **TORCH,
    "adapter.r": whole(1),
    "adapter.lora_dropout": share(),
    "adapter.use_rslora": flag,
    "adapter.use_dora": flag,
    "adapter.bias": one_of("none", "all", "lora_only"),
}
# The choices, and what is sound for them on top.
BASES: dict[tuple[str, ...], dict[str, Check]] = {
    (): {**ADAM, **TORCH, **GALORE, **CALLBACKS},
    ("optim=adamw_8bit",): {**ADAM, "optim.min_8bit_size": whole(0), "optim.is_paged": flag},
    ("optim=lion_8bit",): {**OPTIMIZER, "optim.betas": each(decay, 2)},
    ("optim=sgd", "schedule=linear"): {
        **OPTIMIZER,
        **TORCH,
        "optim.momentum": decay,
        "optim.nesterov": flag,
    },
    ("optim=adafactor",): {
        "optim.relative_size": number(0, above=True),
        "optim.weight_decay": number(),
        "optim.clip_threshold": number(0, above=True),
        "optim.eps": each(number(), 2),
        "optim.warmup_init": flag,
    },
    ("optim=muon", "schedule=constant"): {
        **ADAM,
        "optim.momentum": decay,
        "optim.ns_steps": whole(1),
        "optim.nesterov": flag,
    },
    ("optim=scale",): {
        **ADAM,
        "optim.momentum": decay,
        "optim.dim": one_of(-1, -2),
        "optim.fused": maybe(flag),
    },
    ("optim=apollo",): {
        **ADAM,
        "optim.rank": whole(1),
        "optim.scale": number(0, above=True),
        "optim.per": one_of("channel", "tensor"),
        "optim.refresh_every": whole(1),
        "optim.growth": number(1),
        "optim.seed": lambda v: type(v) is int,
        "optim.fused": maybe(flag),
    },
    ("optim=sinkgd",): {
        **ADAM,
        "optim.scale": number(0, above=True),
        "optim.iterations": whole(1),
        "optim.fused": maybe(flag),
    },
    ("optim=galore_torch",): {
        **ADAM,
        "optim.rank": whole(1),
        "optim.update_proj_gap": whole(1),
        "optim.scale": number(0, above=True),
        "optim.proj_type": one_of("std", "reverse_std", "right", "left", "full"),
        "optim.correct_bias": flag,
    },
    ("optim=adamw", "galore=paper"): {
        **ADAM,
        "galore.projector.lr": number(),
        "galore.projector.penalty": number(),
        "galore.projector.starts_from_svd": flag,
    },
    ("adapter=lora",): LORA,
    ("adapter=qlora",): {
        **LORA,
        "model.quantization_config.load_in_4bit": flag,
        "model.quantization_config.bnb_4bit_quant_type": one_of("fp4", "nf4"),
        "model.quantization_config.llm_int8_threshold": number(),
    },
    ("model=pretrained", "model.name_or_path=a/b"): {
        "model.trust_remote_code": flag,
        "model.revision": maybe(text),
        "model.dtype": maybe(text),
        "model.attn_implementation": maybe(text),
        "model.name_or_path": text,
    },
    ("callbacks=[default,early_stopping,auto_batch_size]",): {
        "callbacks.early_stopping.patience": whole(1),
        "callbacks.early_stopping.min_delta": number(),
        "callbacks.early_stopping.mode": one_of("min", "max"),
        "callbacks.early_stopping.stopping_threshold": maybe(number(-math.inf)),
        "callbacks.auto_batch_size.headroom": decay,
    },
    ("strategy=fsdp", "optim=adamw"): {
        **ADAM,
        "trainer.strategy.cpu_offload": flag,
        "trainer.strategy.reshard_after_forward": flag,
        "trainer.strategy.data_parallel_replicate_size": either(whole(1), one_of("auto")),
    },
}


def is_sound(choices: tuple[str, ...], name: str, value: Any) -> bool:
    """Return whether a setting may have a value with these choices."""
    check = {**SOUND, **BASES[choices]}.get(name)
    return check is not None and check(value)
