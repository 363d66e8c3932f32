"""Optimizers that cannot step a parameter of which each rank holds a part."""

from __future__ import annotations

_CANNOT = {
    "bitsandbytes.": "bitsandbytes' optimizers do not know sharded parameters",
    "transformers.optimization.Adafactor": "Adafactor takes means over whole rows and columns",
    "galore_torch.": "galore-torch projects whole matrices",
    "lit_ft.optim.galore_torch.": "galore-torch projects whole matrices",
    "lit_ft.optim.muon.": "Muon orthogonalises whole matrices",
    "torch.optim.lbfgs.": "LBFGS flattens all parameters",
    "torch.optim._muon.": "Muon orthogonalises whole matrices",
}


def refuse_sharded_state(kind: type) -> None:
    """Raise ValueError for a class of optimizers that needs parameters whole."""
    for base in kind.__mro__:
        for prefix, reason in _CANNOT.items():
            if f"{base.__module__}.{base.__qualname__}".startswith(prefix):
                raise ValueError(
                    f"{reason}: with strategy=fsdp take optim=adamw or optim=galore_subspace, or "
                    "keep the optimizer with strategy=ddp."
                )
