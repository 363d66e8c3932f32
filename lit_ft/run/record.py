"""The record of a start: the files that Hydra keeps of a job, as texts."""

from __future__ import annotations

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

FOLDER = ".hydra"
CONFIG, HYDRA, OVERRIDES = "config.yaml", "hydra.yaml", "overrides.yaml"


def record_of(config: DictConfig) -> dict[str, str]:
    """Return the texts of the files that Hydra would write to `.hydra`, keyed by file name."""
    hydra = HydraConfig.get()
    return {
        CONFIG: OmegaConf.to_yaml(config),
        HYDRA: OmegaConf.to_yaml({"hydra": hydra}),
        OVERRIDES: OmegaConf.to_yaml(hydra.overrides.task),
    }
