"""Ranges of the arguments of other libraries, whose annotations state none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval
from pydantic import Field
from torch.optim import Optimizer

from lit_ft.compat.ranges import Count, Share, WholeNumber

_decays = Interval(ge=0, lt=1)
_Batches = WholeNumber | Share | None
_Clock = Annotated[
    str,
    Field(pattern=r"^\d+:\d{2}:\d{2}:\d{2}$", description="a time (days:hours:minutes:seconds)"),
]
_Devices = Annotated[str, Field(pattern=r"^(-1|\d+(,\d+)*)$", description="numbers such as '0,1'")]
_Epoch = Annotated[float, Interval(gt=0, le=1)]
_Duration = dict[Literal["weeks", "days", "hours", "minutes", "seconds"], WholeNumber]

# A range is of the argument's numbers. A type takes the place of the annotation.
OPTIMIZERS: Mapping[str, Any] = {
    "lr": Ge(0),
    "weight_decay": Ge(0),
    "eps": Ge(0),
    "betas": _decays,
    "beta1": _decays,
    "momentum": _decays,
    "dampening": _decays,
    "clip_threshold": Gt(0),
    "min_8bit_size": WholeNumber,
    "optim_bits": Literal[8, 32],
}
"""Of every optimizer, also those of packages that lit_ft does not know."""

_BY_PACKAGE: Mapping[str, Mapping[str, Any]] = {
    "lightning": {
        "devices": Count | Literal[-1, "auto"] | _Devices | list[WholeNumber],
        "num_nodes": Count,
        "max_steps": Ge(-1),
        "min_steps": Ge(0),
        "max_epochs": Ge(-1),
        "min_epochs": Ge(0),
        "max_time": _Clock | _Duration | None,
        "fast_dev_run": bool | WholeNumber,
        "limit_train_batches": _Batches,
        "limit_val_batches": _Batches,
        "limit_test_batches": _Batches,
        "limit_predict_batches": _Batches,
        "overfit_batches": WholeNumber | Share,
        "val_check_interval": Count | _Epoch | _Clock | _Duration | None,
        "check_val_every_n_epoch": Ge(1),
        "log_every_n_steps": Ge(0),
        "num_sanity_val_steps": Ge(-1),
        "accumulate_grad_batches": Ge(1),
        "gradient_clip_val": Ge(0),
        "gradient_clip_algorithm": Literal["norm", "value"] | None,
        "reload_dataloaders_every_n_epochs": Ge(0),
        "patience": Ge(1),
        "min_delta": Ge(0),
        "mode": Literal["min", "max"],
        "flush_logs_every_n_steps": Ge(1),
        "row_limit": Ge(-1),
    },
    "peft": {
        "r": Ge(1),
        "lora_alpha": Gt(0),
        "lora_dropout": Interval(ge=0, le=1),
        "qalora_group_size": Ge(1),
    },
    "transformers": {
        "llm_int8_threshold": Ge(0),
        "bnb_4bit_quant_type": Literal["fp4", "nf4"],
        "num_cycles": Gt(0),
        "min_lr": Ge(0),
        "min_lr_rate": Interval(ge=0, le=1),
        "power": Gt(0),
        "lr_end": Ge(0),
    },
}

IGNORE_OTHERS = ("transformers.utils.quantization_config",)
"""Modules whose classes accept any name and do nothing with one that they do not know."""


def range_of(made: Any, name: str) -> Any:
    """Return the range of an argument; None if nothing is known.

    Args:
        made: The class or function that takes the argument.
        name: The argument's name.
    """
    if isinstance(made, type) and issubclass(made, Optimizer) and name in OPTIMIZERS:
        return OPTIMIZERS[name]
    return _BY_PACKAGE.get(made.__module__.partition(".")[0], {}).get(name)
