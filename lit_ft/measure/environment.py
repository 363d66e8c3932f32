"""The environment of a run: package versions, processor, memory and GPUs."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from packaging.version import Version

TESTED_TORCH = "2.13"  # the minor release in constraints.txt

_PACKAGES = [
    "lit_ft",
    "torch",
    "lightning",
    "transformers",
    "peft",
    "bitsandbytes",
    "galore-torch",
    "torchmetrics",
    "torchdata",
    "datasets",
    "hydra-core",
    "omegaconf",
    "safetensors",
]


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect a run."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def newer_torch() -> str | None:
    """Return torch's version if its minor release is newer than the tested one, else None."""
    version = str(torch.__version__)
    newer = Version(version).release[:2] > Version(TESTED_TORCH).release[:2]
    return version if newer else None


def hardware() -> dict[str, Any]:
    """Return the hardware of this machine: processor, memory in bytes, GPUs by name."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        gpus = ["Apple MPS"]
    return {
        "cpu": _cpu_name(),
        "cpu_cores": psutil.cpu_count(logical=True),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus,
        "platform": sys.platform,
    }


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    name = re.search(r"model name\s*:\s*(.+)", text)
    return name.group(1) if name else platform.machine()
