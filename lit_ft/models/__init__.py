"""Load models, add adapters to them, and export them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_ft.compat.lazy import on_demand

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

__getattr__ = on_demand(
    __name__,
    {
        "FromConfig": "lit_ft.models.sources",
        "ModelSource": "lit_ft.models.sources",
        "Packaged": "lit_ft.models.sources",
        "Pretrained": "lit_ft.models.sources",
        "add_adapter": "lit_ft.models.adapters",
        "dtype_named": "lit_ft.models.sources",
        "export_model": "lit_ft.models.export.whole",
        "export_streamed": "lit_ft.models.export.streamed",
    },
)
