"""A module and its data, as `python train.py` composes them."""

from __future__ import annotations

from typing import Any

from hydra.utils import instantiate

from lit_ft.run import arguments


def composed(*overrides: str) -> dict[str, Any]:
    """Return the configuration of `python train.py` with these arguments."""
    return arguments.composed(overrides)


def module_and_data(config: dict[str, Any]) -> tuple[Any, Any]:
    """Return the module, before `configure_model`, and its data, ready to train."""
    module = instantiate(config["module"], _convert_="all")
    data = instantiate(config["data"], tokenizer=module.tokenizer, _convert_="all")
    data.prepare_data()
    data.setup("fit")
    return module, data
