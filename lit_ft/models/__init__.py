"""Load models, add adapters to them, and export them."""

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
