"""The rules that move a basis, one per file."""

from lit_ft.subspace.projectors.base import BasisInput, Projector
from lit_ft.subspace.projectors.oja import Oja
from lit_ft.subspace.projectors.online import Online
from lit_ft.subspace.projectors.random import Random
from lit_ft.subspace.projectors.subspace_iteration import SubspaceIteration
from lit_ft.subspace.projectors.svd import SVD

__all__ = ["SVD", "BasisInput", "Oja", "Online", "Projector", "Random", "SubspaceIteration"]
