"""GaLore as parameters: whole weights move in subspaces that ordinary optimizers step.

A projected layer's weight gradient is never formed. Its gradient in the subspace is the `.grad` of
a small parameter; any optimizer steps it; a fold moves the step into the weight.
"""

from lit_ft.subspace.inject import inject, subspace_layers
from lit_ft.subspace.layer import MATCH_ADAMW, SubspaceLayer
from lit_ft.subspace.stepping import SubspaceStep

__all__ = [
    "MATCH_ADAMW",
    "SubspaceLayer",
    "SubspaceStep",
    "inject",
    "subspace_layers",
]
