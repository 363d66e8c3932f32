"""Load models, add adapters to them, and export them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_ft.models.adapters import add_adapter
    from lit_ft.models.export.streamed import export_streamed
    from lit_ft.models.export.whole import export_model
    from lit_ft.models.sources import FromConfig, ModelSource, Packaged, Pretrained, dtype_named

__all__ = [
    "FromConfig",
    "ModelSource",
    "Packaged",
    "Pretrained",
    "add_adapter",
    "dtype_named",
    "export_model",
    "export_streamed",
]

_HOMES = {
    "add_adapter": "adapters",
    "export_streamed": "export.streamed",
    "export_model": "export.whole",
}


def __getattr__(name: str) -> Any:
    # On demand: what only needs a tokenizer should not wait for peft.
    if name not in __all__:
        raise AttributeError(f"module 'lit_ft.models' has no attribute '{name}'")
    return getattr(import_module(f"lit_ft.models.{_HOMES.get(name, 'sources')}"), name)
