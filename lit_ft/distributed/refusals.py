"""Optimizers that cannot step a parameter of which each rank holds a part."""

from __future__ import annotations

from lit_ft.compat.match import reason_against

_OTHERS = "take optim=adamw or optim=galore_subspace"
_CANNOT = {
    r"^lit_ft\.optim\.adafactor\.": None,
    r"\.Adafactor$": "its means are over the rows of one rank: take "
    "optim=adafactor or optim=adafactor_fixed",
    r"^bitsandbytes\.": "bitsandbytes' optimizers do not know sharded parameters: take "
    "optim=adamw_8bit_torchao (with GaLore too, galore=online)",
    r"^(lit_ft\.optim\.)?galore_torch\.": "galore-torch projects whole matrices: take "
    "optim=galore or optim=galore_subspace",
    r"\.Muon": f"Muon orthogonalises whole matrices: {_OTHERS}",
    r"\.LBFGS$": f"LBFGS flattens all parameters: {_OTHERS}",
}


def refuse_sharded_state(kind: type) -> None:
    """Raise ValueError for a class of optimizers that needs parameters whole."""
    if reason := reason_against(kind, _CANNOT):
        raise ValueError(f"{reason}, or keep the optimizer with strategy=ddp.")
