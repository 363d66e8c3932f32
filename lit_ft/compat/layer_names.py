"""Say which names of layers there are, for users who gave one that there is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from difflib import get_close_matches

SHOWN = 16  # names


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the one of `names` that looks most like `name`; None if none looks like it."""
    return next(iter(get_close_matches(name, list(names), n=1)), None)


def counted_names(layers: Iterable[str], *, near: Iterable[str]) -> str:
    """Return the last parts of the names of layers, each with the number of layers that have it.

    Args:
        layers: The full names of the layers, such as "model.layers.0.self_attn.q_proj".
        near: The names that were asked for. Names that look like them come first.

    >>> counted_names(["layers.0.up", "layers.1.up", "layers.0.down", "head"], near=["haed"])
    'head, up (2), down'
    """
    counts = Counter(layer.rpartition(".")[2] for layer in layers)
    close = [found for name in near if (found := nearest(name, counts)) is not None]
    ordered = list(dict.fromkeys([*close, *counts]))
    shown = [f"{name} ({counts[name]})" if counts[name] > 1 else name for name in ordered[:SHOWN]]
    more = [f"and {len(ordered) - SHOWN} more"] if len(ordered) > SHOWN else []
    return ", ".join([*shown, *more])
