"""A module and its data, as `python train.py` composes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

CONF = Path(__file__).parents[2] / "conf"


def composed(*overrides: str) -> dict[str, Any]:
    """Return the configuration of `python train.py` with these arguments."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_container(compose("train", list(overrides)), resolve=True)
    assert isinstance(config, dict)
    return {str(name): value for name, value in config.items()}


def module_and_data(config: dict[str, Any]) -> tuple[Any, Any]:
    """Return the module, before `configure_model`, and its data, ready to train."""
    module = instantiate(config["module"], _convert_="all")
    data = instantiate(config["data"], tokenizer=module.tokenizer, _convert_="all")
    data.prepare_data()
    data.setup("fit")
    return module, data
