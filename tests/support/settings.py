"""Generated configurations: choices and settings as they are typed, and what becomes of them."""

from __future__ import annotations

import copy
import time
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import CompactHydraException, ConfigCompositionException
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from lit_ft.run.settings import admit
from tests.support.running import CONF, SHORT, run_job
from tests.support.sound import BASES, SOUND, is_sound

Drawn = tuple[tuple[str, ...], dict[str, str]]

# What these runs set themselves, or what would start processes, compilers or other machines.
OF_THE_RUN = (
    *("resume", "trusted_packages", "module.compile", "data.num_workers", "trainer.num_nodes"),
    *("trainer.max_steps", "trainer.max_epochs", "trainer.limit_train_batches", "validate_only"),
    *("callbacks.samples.max_new_tokens", "callbacks.export.push_to_hub"),
)
TOLD = ("ValueError", "Refusal", "Misconfiguration", "MisconfigurationException")
TOLD += ("FloatingPointError", "NotFinite")
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
    *(
        "channel",
        "tensor",
        "match_adamw",
        "right",
        "std",
        "all",
        "min",
        "max",
        "lora_only",
        "nf4",
        "full",
    ),
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


def configuration(random: Random, *, sound: bool = False) -> Drawn:
    """Draw choices, and from one to five settings as they are typed."""
    bases = [choices for choices in BASES if not (sound and set(choices) & ELSEWHERE)]
    choices = random.choice(bases)
    names = [*SOUND, *BASES[choices]]
    chosen = random.sample(names, random.randint(1, 5))
    if not sound and random.randrange(10) == 0:
        chosen[-1] = mistyped(chosen[-1])
    elif sound or random.randrange(2):  # mostly sound, so that configurations as a whole are
        fitting = {
            name: [one for one in TYPED if is_sound(choices, name, value_of(one))]
            for name in chosen
        }
        return choices, {name: random.choice(fitting[name]) for name in chosen}
    return choices, {name: random.choice(TYPED) for name in chosen}


def configurations(*, sound: bool = False) -> st.SearchStrategy[Drawn]:
    """Return a strategy of hypothesis that draws configurations."""
    return st.randoms(use_true_random=False).map(lambda one: configuration(one, sound=sound))


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


def unsound(drawn: Drawn) -> set[str]:
    """Return the settings that no run can have."""
    choices, typed = drawn
    return {name for name, one in typed.items() if not is_sound(choices, name, value_of(one))}


def agrees(drawn: Drawn) -> bool:
    """Hold the check to what is sound, and return whether the configuration is."""
    assert set(faults_of(*drawn)) == unsound(drawn), drawn
    return not unsound(drawn)


def quick(drawn: Drawn) -> Drawn:
    """Return the configuration without what a short run sets itself."""
    choices, typed = drawn
    return choices, {n: one for n, one in typed.items() if n not in OF_THE_RUN and one != HUGE}


def arguments_of(drawn: Drawn) -> list[str]:
    """Return the arguments of a run of two steps."""
    choices, typed = quick(drawn)
    own = [f"++{name}={one}" for name, one in typed.items()]
    rank = ["galore.rank=4"] if any("galore." in name for name in BASES[choices]) else []
    return ["model=tiny", *choices, *SHORT, *own, *TWO_STEPS, *rank]


def run(drawn: Drawn, run_dir: Path, *more: str) -> str:
    """Train two steps and return the status; a run that is refused must say what to change."""
    try:
        summary = run_job(run_dir, *arguments_of(drawn), *more)
    except ConfigCompositionException as error:  # a list for a mapping
        assert str(error).startswith("Error merging override "), error
        return "refused"
    except CompactHydraException as error:
        kind, _, said = str(error).strip().partition(": ")
        assert kind in TOLD and said, error
        return "refused"
    assert summary["steps"] == 2
    return str(summary["status"])
