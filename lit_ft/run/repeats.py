"""Settings that repeat others, so that each is listed once."""

from __future__ import annotations

_REPEATS = {
    "module.model": "model",
    "module.adapter": "adapter",
    "module.optimizer": "optim",
    "module.groups": "groups",
    "module.schedule": "schedule",
    "module.loss": "loss",
    "callbacks.galore": "galore",
    "callbacks.lm_eval": "eval",
    "callbacks.subspace_refresh": "galore.refresh",
    "module.seed": "seed",
    "model.seed": "seed",
    "data.seed": "seed",
    "galore.seed": "seed",
}


def repeated(path: str) -> str:
    """Return the setting that a path of the configuration repeats, or else the path itself.

    >>> repeated("module.optimizer.lr"), repeated("optim.lr")
    ('optim.lr', 'optim.lr')
    """
    for place, source in _REPEATS.items():
        if path == place or path.startswith(f"{place}."):
            path = source + path.removeprefix(place)
    return path
