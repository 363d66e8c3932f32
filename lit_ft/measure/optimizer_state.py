"""Estimate the size of an optimizer's state before its first step."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_ft.measure.memory import state_tensors
from lit_ft.measure.storage_bytes import storage_bytes


def estimate_state_bytes(optimizer: Optimizer) -> list[int | None]:
    """Return the bytes of state that each parameter group will have on this rank after one step.

    A copy of the optimizer steps parameters of the same shapes on the meta device, where tensors
    take no memory. Neither the optimizer nor its parameters change. The entry of a group is None if
    the optimizer cannot make its state on the meta device.
    """
    probe = _without_state(optimizer)
    return [_group_state_bytes(probe, group) for group in optimizer.param_groups]


def _group_state_bytes(probe: Optimizer, group: dict[str, Any]) -> int | None:
    tensors: list[Tensor] = []
    for parameter in group["params"]:
        if parameter.requires_grad:
            found = _state_of(probe, {**group, "foreach": False, "fused": False}, parameter)
            if found is None:
                return None
            tensors += found
    return storage_bytes(tensors)


def _state_of(probe: Optimizer, group: dict[str, Any], parameter: Tensor) -> list[Tensor] | None:
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    stand_in = nn.Parameter(torch.empty_like(local, device="meta"))
    stand_in.grad = torch.empty_like(stand_in)
    probe.state = defaultdict(dict)
    probe.param_groups = [{**group, "params": [stand_in]}]
    # Optimizers make a parameter's state before they use it. An update that reads a value
    # (Adafactor's RMS), runs a kernel that meta lacks or looks the parameter up fails only after
    # the state is made, with any kind of exception.
    try:
        type(probe).step(probe)
    except Exception:
        if not probe.state[stand_in]:
            return None
    return list(state_tensors(dict(probe.state[stand_in])))


def _without_state(optimizer: Optimizer) -> Optimizer:
    # Optimizer.__getstate__ leaves out hooks and a step wrapped by a scheduler, neither of which
    # may run here. It also leaves out subclasses' attributes (bitsandbytes), which the copy needs.
    probe = copy.copy(optimizer)
    for name, value in vars(optimizer).items():
        if name != "step" and name not in vars(probe):
            vars(probe)[name] = value.copy() if isinstance(value, dict) else value
    if hasattr(probe, "is_paged"):
        probe.is_paged = False  # paged memory is allocated by CUDA, whatever the device
    return probe
