"""The rows of peers.py, and which of ours each peer is held against."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from support.peers.by_hand import GaLoreByHand
from support.peers.job import Job, Trained
from support.peers.meter import Meter
from support.peers.with_lit_ft import LitFt, Untrained
from support.peers.with_transformers import PeftLora, Sft, Transformers

WHOLE = (5e-5, 1e-4, 2e-4)  # rates for AdamW's size of step
SCALED = (2e-4, 4e-4, 8e-4)  # GaLore's packages multiply the rate by a scale of 0.25
ADAPTER = (5e-4, 1e-3, 2e-3)

# transformers' documentation names these modules for both.
_HIDDEN = {"optim_target_modules": [r".*.attn.*", r".*.mlp.*"]}
_GALORE = {**_HIDDEN, "optim_args": "rank={rank}, update_proj_gap=200, scale=0.25"}
_APOLLO = {
    **_HIDDEN,
    "optim_args": "proj=random, rank={rank}, scale=1.0, scale_type=channel, update_proj_gap=200",
}
_WHOLE_EMBEDDING = "Attention and MLP are in subspaces, and the embedding trains whole with AdamW."
_NO_CLIPPING = "trainer.gradient_clip_val=null"
_LAYERWISE = (
    f"update=layerwise callbacks.layerwise.min_grad_bytes={{min_grad_bytes}} {_NO_CLIPPING}"
)


class Trains(Protocol):
    """Whoever trains a row."""

    def train(self, job: Job, meter: Meter) -> Trained:
        """Train, and return the model."""


@dataclass(frozen=True)
class Row:
    """One row.

    Args:
        title: The row's name for people.
        way: Who trains it.
        rates: The learning rates that are tried.
        against: The names of our rows that a peer is held against, the closest one first; empty for
            a row of ours.
        packages: What pip installs for this row in an environment of its own.
        note: What a reader must know of the row; empty for nothing.
    """

    title: str
    way: Trains
    rates: tuple[float, ...]
    against: tuple[str, ...] = field(default=())
    packages: tuple[str, ...] = field(default=())
    note: str = ""


UNTRAINED = "untrained"
ROWS = {
    UNTRAINED: Row("before training", Untrained(), (0.0,)),
    "hf_adamw": Row("Trainer, adamw_torch", Transformers("adamw_torch"), WHOLE, ("adamw",)),
    "trl_sft": Row("TRL's SFTTrainer", Sft(), WHOLE, ("adamw",)),
    "adamw": Row("lit_ft, adamw", LitFt("optim=adamw"), WHOLE),
    "hf_adamw_8bit": Row(
        "Trainer, adamw_8bit",
        Transformers("adamw_8bit"),
        WHOLE,
        ("adamw_8bit", "adamw_8bit_layerwise"),
    ),
    "adamw_8bit": Row("lit_ft, adamw_8bit", LitFt("optim=adamw_8bit"), WHOLE),
    "adamw_8bit_layerwise": Row(
        "lit_ft, adamw_8bit, layerwise, no clipping", LitFt(f"optim=adamw_8bit {_LAYERWISE}"), WHOLE
    ),
    "hf_adafactor": Row(
        "Trainer, adafactor",
        Transformers("adafactor", {"weight_decay": 0.0}),
        WHOLE,
        ("adafactor",),
    ),
    "adafactor": Row("lit_ft, adafactor_fixed", LitFt("optim=adafactor_fixed"), WHOLE),
    "peft_lora": Row("peft's LoRA in Trainer", PeftLora(), ADAPTER, ("lora",)),
    "lora": Row("lit_ft, adapter=lora", LitFt("adapter=lora"), ADAPTER),
    "hf_galore": Row(
        "Trainer, galore_adamw",
        Transformers("galore_adamw", _GALORE),
        SCALED,
        ("galore_subspace", "galore"),
        note=_WHOLE_EMBEDDING,
    ),
    "galore_by_hand": Row(
        "galore-torch by hand",
        GaLoreByHand(),
        SCALED,
        ("galore_subspace", "galore"),
        note=_WHOLE_EMBEDDING,
    ),
    "galore_subspace": Row(
        "lit_ft, galore_subspace", LitFt("optim=galore_subspace galore.rank={rank}"), WHOLE
    ),
    "galore": Row("lit_ft, galore", LitFt("optim=galore galore.rank={rank}"), WHOLE),
    "hf_galore_layerwise": Row(
        "Trainer, galore_adamw_layerwise",
        Transformers("galore_adamw_layerwise", _GALORE),
        SCALED,
        ("galore_subspace_layerwise",),
        note=f"{_WHOLE_EMBEDDING} Gradients are gone when Trainer clips them.",
    ),
    "galore_subspace_layerwise": Row(
        "lit_ft, galore_subspace, layerwise, no clipping",
        LitFt(f"optim=galore_subspace galore.rank={{rank}} {_LAYERWISE}"),
        WHOLE,
    ),
    "hf_apollo": Row(
        "Trainer, apollo_adamw",
        Transformers("apollo_adamw", _APOLLO),
        WHOLE,
        ("apollo",),
        ("apollo-torch==1.0.3",),
    ),
    "apollo": Row("lit_ft, apollo", LitFt("optim=apollo optim.rank={rank}"), WHOLE),
}
PEERS = {name: row for name, row in ROWS.items() if row.against}
TRAINED = [name for name in ROWS if name != UNTRAINED]
