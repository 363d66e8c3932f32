"""GaLore as parameters: whole weights move in subspaces that ordinary optimizers step.

A projected layer's weight gradient is never formed. Its gradient in the subspace is the `.grad` of
a small parameter. An ordinary optimizer steps that parameter, and a fold adds the step to the
weight.
"""

from lit_ft.subspace.checks import MATCH_ADAMW
from lit_ft.subspace.inject import (
    inject,
    keep_out_of_broadcasts,
    layer_group,
    subspace_layers,
    targeted,
)
from lit_ft.subspace.layers.base import SubspaceLayer
from lit_ft.subspace.schedule import Refresh
from lit_ft.subspace.updater import SubspaceUpdater

__all__ = [
    "MATCH_ADAMW",
    "Refresh",
    "SubspaceLayer",
    "SubspaceUpdater",
    "inject",
    "keep_out_of_broadcasts",
    "layer_group",
    "subspace_layers",
    "targeted",
]
