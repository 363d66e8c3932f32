"""GaLore with ordinary optimizers: whole weights are trained through small parameters.

Each targeted layer has a small parameter, whose `.grad` is the weight's gradient in a subspace. An
ordinary optimizer steps the small parameter, and a fold then adds the step to the weight. The
weight's whole gradient is formed only if the projector computes a basis from it, as `SVD` does.
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
