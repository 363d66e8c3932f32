"""The original GaLore package's optimizers, as the yardstick: with groups by rule, and resume."""

from __future__ import annotations

from typing import Any

import galore_torch
from galore_torch.galore_projector import GaLoreProjector
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

_SETTINGS = ("rank", "update_proj_gap", "scale", "proj_type")


class _OriginalGaLore(Optimizer):
    """Projects the groups that ask for it, and saves their bases.

    Upstream a basis hides in an object in the state, which `weights_only` checkpoints refuse.

    Args:
        params: Parameters or groups; groups with `galore: True` hold matrices to project.
        rank: Of the subspaces; at most a matrix's smaller side.
        update_proj_gap: Steps between two SVDs of a matrix's gradient.
        scale: α, on the projected update.
        proj_type: The side that is projected: "std" is the smaller state.
        **options: Those of the upstream optimizer.
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        rank: int = 128,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        **options: Any,
    ) -> None:
        if rank < 1 or update_proj_gap < 1:
            raise ValueError(f"rank={rank} and update_proj_gap={update_proj_gap} must be positive.")
        super().__init__(params, **options)
        self.defaults["galore"] = False
        settings = dict(zip(_SETTINGS, (rank, update_proj_gap, scale, proj_type), strict=True))
        for group in self.param_groups:
            if group.get("galore"):
                group.update(settings)

    def state_dict(self) -> dict[str, Any]:
        """Return torch's, with each basis in its projector's place."""
        saved = super().state_dict()
        saved["state"] = {
            index: {**state, "projector": state["projector"].ortho_matrix}
            if "projector" in state
            else state
            for index, state in saved["state"].items()
        }
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for parameter in group["params"]:
                if "projector" in (state := self.state[parameter]):
                    projector = GaLoreProjector(**{name: group[name] for name in _SETTINGS})
                    projector.ortho_matrix = state["projector"]
                    state["projector"] = projector


class GaLoreTorchAdamW(_OriginalGaLore, galore_torch.GaLoreAdamW):  # type: ignore[misc]
    """galore_torch.GaLoreAdamW (arXiv:2403.03507)."""

    def __init__(self, params: ParamsT, **options: Any) -> None:
        super().__init__(params, no_deprecation_warning=True, **options)


class GaLoreTorchAdafactor(_OriginalGaLore, galore_torch.GaLoreAdafactor):  # type: ignore[misc]
    """galore_torch.GaLoreAdafactor (arXiv:2403.03507), at a rate of one's own."""

    def __init__(self, params: ParamsT, **options: Any) -> None:
        super().__init__(params, scale_parameter=False, relative_step=False, **options)
