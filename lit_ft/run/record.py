"""The record of a start: the files that Hydra keeps of a job, as texts."""

from __future__ import annotations

from pathlib import Path

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


def numbered(run_dir: Path) -> list[tuple[int, Path]]:
    """Return the numbers and the folders of the records of a run's later starts, in order."""
    found = (one for one in (run_dir / FOLDER).glob("[0-9]*") if one.name.isdecimal())
    return sorted((int(one.name), one) for one in found)
