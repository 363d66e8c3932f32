"""Compare the names in an adapter's configuration with the layers of the model."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from lit_ft.compat import remedies
from lit_ft.compat.layer_names import counted_names, nearest
from lit_ft.compat.refusal import Refusal


def match_names(model: nn.Module, config: Any) -> None:
    """Compare each name in an adapter's configuration with the layers of the model.

    peft itself is content if one name of a list matches, and says nothing of the others.

    Args:
        model: The model that the adapter is for, with its weights or on the meta device.
        config: The adapter's configuration, any `peft.PeftConfig`. It is not changed.

    Raises:
        Refusal: If a name, or the number of a layer, matches nothing. Lists the names that there
            are.
    """
    config = copy.deepcopy(config)
    if isinstance(config, PeftConfig):  # names of transformers 4 are still good
        convert_peft_config_for_transformers(config, model, None)
    layers = dict(model.named_modules(remove_duplicate=False))
    del layers[""]
    linear = [name for name, layer in layers.items() if isinstance(layer, nn.Linear | Conv1D)]
    own = [name for name, layer in layers.items() if any(True for _ in layer.parameters(False))]
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    _match(config, "target_modules", layers, offered=linear)
    _match(config, "exclude_modules", layers, offered=linear)
    _match(config, "target_parameters", parameters, offered=parameters)
    _match(config, "modules_to_save", layers, offered=own)
    _match_numbers(config, layers)


def _match(config: Any, setting: str, layers: Iterable[str], *, offered: Iterable[str]) -> None:
    """Raise Refusal if a name in `config`'s `setting` is that of none of the layers."""
    given = getattr(config, setting, None)
    if not given or given == remedies.EVERY_LINEAR_LAYER:
        return
    if isinstance(given, str):  # a regular expression
        names, unknown = [given], [given]
        if any(re.fullmatch(given, layer) for layer in layers):
            return
    else:
        names = sorted(given)
        matches = str.endswith if setting == "modules_to_save" else _is_in  # as peft compares
        unknown = [name for name in names if not any(matches(layer, name) for layer in layers)]
    if not unknown:
        return
    leaves = [layer.rpartition(".")[2] for layer in offered]
    meant = [nearest(name, leaves) if name in unknown else name for name in names]
    raise Refusal(
        f"{setting} has {', '.join(unknown)}, which nothing in the model is called. There are "
        f"{counted_names(offered, near=unknown)}",
        *remedies.layer_names(setting, sorted({name for name in meant if name is not None})),
    )


def _is_in(layer: str, name: str) -> bool:
    """Whether peft counts a layer to those that `name` stands for."""
    return layer == name or layer.endswith(f".{name}")


def _match_numbers(config: Any, layers: Iterable[str]) -> None:
    """Raise Refusal if a number in `config`'s `layers_to_transform` has none of its targets."""
    given = getattr(config, "layers_to_transform", None)
    if given is None or not config.target_modules or isinstance(config.target_modules, str):
        return

    def has_target(number: int) -> bool:
        config.layers_to_transform = [number]
        return any(check_target_module_exists(config, layer) for layer in layers)

    numbers = [given] if isinstance(given, int) else given
    if missing := [str(number) for number in numbers if not has_target(number)]:
        parts = {part for layer in layers for part in layer.split(".")}
        there = [n for n in sorted(int(part) for part in parts if part.isdigit()) if has_target(n)]
        raise Refusal(
            f"layers_to_transform has {', '.join(missing)}, where no layer is a target. Those that "
            f"have targets are {', '.join(map(str, there)) or 'none'}"
        )
