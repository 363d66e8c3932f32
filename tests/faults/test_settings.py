"""Generated configurations: what is admitted is sound, and what is refused is named.

What is sound is said here, by hand, and not read from the constructors.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import CompactHydraException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from lit_ft.run.settings import admit
from tests.support.running import CONF, SHORT, run_job

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
# What these runs set themselves, or what would start processes, compilers or other machines.
OF_THE_RUN = (
    *("resume", "trusted_packages", "module.compile", "data.num_workers", "trainer.num_nodes"),
    *("trainer.max_steps", "trainer.max_epochs", "trainer.limit_train_batches", "validate_only"),
    *("callbacks.samples.max_new_tokens", "callbacks.export.push_to_hub"),
)
TOLD = ("ValueError", "Refusal", "Misconfiguration", "MisconfigurationException")
TOLD += ("FloatingPointError",)
ELSEWHERE = {"strategy=fsdp", "model=pretrained", "adapter=qlora"}
TWO_STEPS = ["trainer.max_steps=2"]
# What interpolations read. Resolving them again takes most of the time.
READ_ELSEWHERE = ("seed", "galore.", "checkpoint.")
HUGE = str(2**32)  # more than a seed may be; as a number of batches, it takes weeks
TYPED = [
    *("true", "false", "no", "off", "yes", "n", "null", "nan", "inf", "-inf", "auto", "abc", "''"),
    *("-2", "-1", "0", "1", "2", "3", "16", "64", "1000", HUGE, "1e-4", "0.05", "0.5"),
    *("0.9", "1.0", "2.0", "2.5", "-0.5", "1e30", "'4'", "'0.5'", "'true'", "'null'", "True"),
    *("[]", "[1,2]", "[0.9,0.95]", "[0.9,1.0]", "[0,0]", "[0.9]", "[a,b]", "[true,0.5]", "{}"),
    *("{a: 1}", "drop", "cut", "assistant", "refuse", "skip", "norm", "value", "warn", "bf16"),
    *("match_adamw", "right", "std", "all", "min", "max", "lora_only", "nf4", "full"),
]


@cache
def base(choices: tuple[str, ...]) -> tuple[DictConfig, Any, Any]:
    """Return what choices compose: with its interpolations, as they are written, and resolved."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        job = compose("train", ["model=tiny", "run_dir=here", "~local", *choices])
    OmegaConf.set_struct(job, False)
    written = OmegaConf.to_container(job, resolve=False)
    config = OmegaConf.to_container(job, resolve=True)
    admit(config, written, [])  # imports the libraries, as every run does
    return job, written, config


@cache
def value_of(typed: str) -> Any:
    return OverridesParser.create().parse_override(f"++x={typed}").value()


def mistyped(name: str) -> str:
    parent, dot, own = name.rpartition(".")
    swapped = own[:-2] + own[:-3:-1]
    return f"{parent}{dot}{swapped if swapped != own else f'{own}x'}"


@st.composite
def configurations(
    draw: st.DrawFn, *, sound: bool = False
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Draw choices, and from one to five settings as they are typed."""
    bases = [choices for choices in BASES if not (sound and set(choices) & ELSEWHERE)]
    choices = draw(st.sampled_from(bases))
    names = [*SOUND, *BASES[choices]]
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=5, unique=True))
    if not sound and draw(st.integers(0, 9)) == 0:
        chosen[-1] = mistyped(chosen[-1])
    elif sound or draw(st.booleans()):  # mostly sound, so that configurations as a whole are
        fitting = {
            name: [one for one in TYPED if {**SOUND, **BASES[choices]}[name](value_of(one))]
            for name in chosen
        }
        return choices, {name: draw(st.sampled_from(fitting[name])) for name in chosen}
    return choices, {name: draw(st.sampled_from(TYPED)) for name in chosen}


def put(node: Any, path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for name in parents:
        node = node[name]
    node[last] = value


def faults_of(choices: tuple[str, ...], typed: dict[str, str]) -> list[str]:
    """Return the settings that the check names; none if it admits the configuration."""
    job, written, config = map(copy.deepcopy, base(choices))
    for name, one in typed.items():
        OmegaConf.update(job, name, value_of(one), merge=False, force_add=True)
        put(written, name, value_of(one))
        put(config, name, value_of(one))
    if any(name.startswith(READ_ELSEWHERE) for name in typed):
        config = OmegaConf.to_container(job, resolve=True)
    started = time.perf_counter()
    try:
        admit(config, written, [f"{name}={one}" for name, one in typed.items()])
    except ValueError as error:
        lines = [line for line in str(error).splitlines() if not line.startswith("  Names: ")]
        return [line.replace(": ", "=").partition("=")[0] for line in lines]
    finally:
        assert time.perf_counter() - started < 5
    return []


def agrees(drawn: tuple[tuple[str, ...], dict[str, str]]) -> bool:
    """Hold the check to what is sound, and return whether the configuration is."""
    choices, typed = drawn
    sound = {**SOUND, **BASES[choices]}
    wrong = {name for name, one in typed.items() if not sound.get(name, _never)(value_of(one))}
    assert set(faults_of(choices, typed)) == wrong, (choices, typed)
    return not wrong


def _never(_: Any) -> bool:
    return False


def run(drawn: tuple[tuple[str, ...], dict[str, str]], run_dir: Path) -> str:
    """Train two steps and return the status; a run that is refused must say what to change."""
    choices, typed = drawn
    quick = {name: one for name, one in typed.items() if name not in OF_THE_RUN and one != HUGE}
    own = [f"++{name}={one}" for name, one in quick.items()]
    rank = ["galore.rank=4"] if any("galore." in name for name in BASES[choices]) else []
    try:
        summary = run_job(run_dir, "model=tiny", *choices, *SHORT, *own, *TWO_STEPS, *rank)
    except CompactHydraException as error:
        kind, _, said = str(error).strip().partition(": ")
        assert kind in TOLD and said, error
        return "refused"
    assert summary["steps"] == 2
    return str(summary["status"])


@given(configurations())
@settings(max_examples=100, derandomize=True, deadline=None)
def test_a_configuration_is_admitted_if_and_only_if_it_is_sound(drawn):
    agrees(drawn)


@pytest.mark.slow
@given(configurations())
@settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))
def test_three_thousand_configurations_are_admitted_if_and_only_if_they_are_sound(drawn):
    agrees(drawn)


@pytest.mark.slow
@given(drawn=configurations(sound=True))
@settings(max_examples=12, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
def test_what_is_admitted_trains_or_is_told_what_does_not_go_together(
    drawn, library, tmp_path_factory
):
    assert run(drawn, tmp_path_factory.mktemp("run")) in ("completed", "refused")
