"""The optimizers of the original GaLore package, for comparison, with groups and resuming."""

from __future__ import annotations

from typing import Any, Literal

import galore_torch
from galore_torch.galore_projector import GaLoreProjector
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lit_ft.compat.ranges import Count, Positive

_SETTINGS = ("rank", "update_proj_gap", "scale", "proj_type")
_SIDES = ("std", "reverse_std", "right", "left", "full")


class _OriginalGaLore(Optimizer):
    """Projects the groups that have `galore: True`, and saves their bases as tensors.

    The original keeps each basis in an object in the state. A checkpoint with such an object cannot
    be loaded with `weights_only`.

    Args:
        params: The parameters or groups. Groups with `galore: True` hold the matrices to project.
        rank: The rank of the subspaces, at most a matrix's smaller side.
        update_proj_gap: The number of optimizer steps between two SVDs of a matrix's gradient.
        scale: The scale α of the projected update.
        proj_type: The side that is projected, by the original's name: "std", "reverse_std",
            "right", "left" or "full".
        **options: The options of the original optimizer.

    Raises:
        ValueError: If `rank` or `update_proj_gap` is not positive, or if `proj_type` is unknown.
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        rank: Count = 128,
        update_proj_gap: Count = 200,
        scale: Positive = 0.25,
        proj_type: Literal["std", "reverse_std", "right", "left", "full"] = "std",
        **options: Any,
    ) -> None:
        if rank < 1 or update_proj_gap < 1:
            raise ValueError(
                f"rank={rank} and update_proj_gap={update_proj_gap}: give positive whole numbers."
            )
        if proj_type not in _SIDES:
            raise ValueError(f"proj_type={proj_type}: give one of {', '.join(_SIDES)}.")
        given = (rank, update_proj_gap, scale, proj_type)
        self._settings = dict(zip(_SETTINGS, given, strict=True))
        super().__init__(params, **options)
        self.defaults["galore"] = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, whose parameters are projected if it has `galore: True`."""
        settings = self._settings if param_group.get("galore") else {}
        super().add_param_group({**settings, **param_group})

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict, with the basis in place of each projector object."""
        saved = super().state_dict()
        saved["state"] = {
            index: {**state, "projector": state["projector"].ortho_matrix}
            if "projector" in state
            else state
            for index, state in saved["state"].items()
        }
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state.get(parameter, {})
                if "projector" in state:
                    projector = GaLoreProjector(**{name: group[name] for name in _SETTINGS})
                    projector.ortho_matrix = state["projector"]
                    state["projector"] = projector


class GaLoreTorchAdamW(_OriginalGaLore, galore_torch.GaLoreAdamW):  # type: ignore[misc]
    """galore_torch.GaLoreAdamW (arXiv:2403.03507)."""

    def __init__(self, params: ParamsT, **options: Any) -> None:
        super().__init__(params, no_deprecation_warning=True, **options)


class GaLoreTorchAdafactor(_OriginalGaLore, galore_torch.GaLoreAdafactor):  # type: ignore[misc]
    """galore_torch.GaLoreAdafactor (arXiv:2403.03507), with a given rate, not relative steps."""

    def __init__(self, params: ParamsT, **options: Any) -> None:
        super().__init__(params, scale_parameter=False, relative_step=False, **options)
