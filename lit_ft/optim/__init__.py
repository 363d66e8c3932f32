"""Optimizers, parameter groups, schedules, and functions that change how an optimizer steps."""

from lit_ft.optim.adamw_8bit import RowwiseAdamW8bit
from lit_ft.optim.apollo import Apollo
from lit_ft.optim.groups import DECAY_MATRICES, GroupRule, build_optimizer, parameter_groups
from lit_ft.optim.muon import MuonAdamW
from lit_ft.optim.narrowed import narrowed
from lit_ft.optim.rounded import stochastically_rounded
from lit_ft.optim.row_chunked import row_chunked
from lit_ft.optim.scale import Scale
from lit_ft.optim.schedules import WarmupSchedule
from lit_ft.optim.sinkgd import SinkGD

__all__ = [
    "DECAY_MATRICES",
    "Apollo",
    "GroupRule",
    "MuonAdamW",
    "RowwiseAdamW8bit",
    "Scale",
    "SinkGD",
    "WarmupSchedule",
    "build_optimizer",
    "narrowed",
    "parameter_groups",
    "row_chunked",
    "stochastically_rounded",
]
