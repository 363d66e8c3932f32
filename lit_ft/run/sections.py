"""The settings of train.py that are no arguments of an object, and what each of them may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Interval

from lit_ft.compat.ranges import Count, WholeNumber
from lit_ft.run.types import Made
from lit_ft.terminal import Style


@dataclass
class Job:
    """The settings of train.py itself; other top-level names must be read by one of them."""

    run_dir: str
    seed: Annotated[int, Interval(ge=0, lt=2**32)]
    resume: str | None
    overwrite: bool
    validate_only: bool
    ui: Style
    nonfinite: Literal["stop", "skip"]
    nonfinite_limit: Count
    trusted_packages: list[str]
    module: Made
    data: Made
    trainer: Made
    checkpoint: dict[str, Any]
    plan: dict[str, Any]
    compare: dict[str, Any]
    eval: dict[str, Any]
    model: Made
    optim: Made
    loss: Made | None = None
    groups: list[Made] | None = None
    schedule: Made | None = None
    adapter: Any = None
    galore: dict[str, Any] | None = None
    callbacks: dict[str, Any] | None = None
    logger: dict[str, Any] | None = None


@dataclass
class Checkpoint:
    """The settings under `checkpoint`."""

    every_n_steps: Count
    keep: Count = 2
    save_optimizer: bool = True


@dataclass
class Plan:
    """The settings under `plan`."""

    check: bool = True
    gpu: str | int | None = None


@dataclass
class Compare:
    """The settings under `compare`, which `python -m lit_ft.compare` alone reads."""

    methods: list[str]
    quick: list[str]
    seeds: list[Annotated[int, Interval(ge=0, lt=2**32)]]
    tune: bool = True


@dataclass
class Eval:
    """The settings under `eval`."""

    tasks: list[str]
    include_path: str | None = None
    limit: Count | None = None
    num_fewshot: WholeNumber | None = None
    batch_size: Count = 8
    apply_chat_template: bool = False


@dataclass
class Galore:
    """The names under `galore`; the callbacks that read them say what they admit."""

    rank: Any = None
    scale: Any = None
    targets: Any = None
    side: Any = None
    projector: Any = None
    refresh: Any = None


SECTIONS = {
    "": Job,
    "checkpoint": Checkpoint,
    "compare": Compare,
    "eval": Eval,
    "galore": Galore,
    "plan": Plan,
}
"""The settings of each part of a configuration that is no object, keyed by its name."""
