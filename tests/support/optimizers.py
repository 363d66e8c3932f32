"""The optimizers that lit_ft ships or trains with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import bitsandbytes as bnb
from torch.optim import SGD, AdamW, Muon, Optimizer

from lit_ft.optim import Apollo, MuonAdamW, RowwiseAdamW8bit, Scale, SinkGD
from lit_ft.optim.adafactor import Adafactor, RelativeStepAdafactor

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": partial(AdamW, lr=1e-2, foreach=False),
    "adamw_foreach": partial(AdamW, lr=1e-2, foreach=True),
    "adamw_fused": partial(AdamW, lr=1e-2, fused=True),
    "sgd": partial(SGD, lr=1e-2, momentum=0.9),
    "torch_muon": partial(Muon, lr=1e-2),
    "muon": partial(MuonAdamW, lr=1e-2, fused=True),
    "adafactor": RelativeStepAdafactor,
    "adafactor_fixed": partial(Adafactor, lr=1e-2, relative_step=False, scale_parameter=False),
    "adamw_8bit": partial(bnb.optim.AdamW8bit, lr=1e-2),
    "adamw_8bit_torchao": partial(RowwiseAdamW8bit, lr=1e-2),
    "lion_8bit": partial(bnb.optim.Lion8bit, lr=1e-2),
    "scale": partial(Scale, lr=1e-2, momentum=0.9),
    "scale_columns": partial(Scale, lr=1e-2, dim=-2),
    "apollo": partial(Apollo, lr=1e-2, rank=8, refresh_every=2),
    "apollo_mini": partial(Apollo, lr=1e-2, rank=1, scale=11.3, per="tensor"),
    "sinkgd": partial(SinkGD, lr=1e-2),
}
