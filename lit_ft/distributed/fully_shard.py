"""Shard a transformer over ranks, block by block (FSDP2, torch's `fully_shard`)."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from lit_ft.compat import remedies
from lit_ft.compat.refusal import Refusal
from lit_ft.optim.model_blocks import declared_blocks
from lit_ft.subspace import SubspaceLayer
from lit_ft.tensors.sharding import fsdp_root

T = TypeVar("T")
_GATHERED = "with_root_gathered"


def fully_shard_model(model: nn.Module, mesh: DeviceMesh, **options: Any) -> None:
    """Shard every parameter of `model` over the ranks of `mesh`, in place.

    The weights of one block are gathered at a time. Weights outside the blocks (embeddings, the
    last norm, the head) stay gathered during the whole forward and backward pass.

    Args:
        model: A transformers model, with values or still on the meta device.
        mesh: The mesh of the data-parallel ranks.
        **options: Further options of torch's `fully_shard`, such as `reshard_after_forward`,
            `mp_policy` or `offload_policy`.

    Raises:
        Refusal: If the model does not name its blocks in `_no_split_modules`.
    """
    blocks = list(declared_blocks(model).values())
    if not blocks:
        raise Refusal(
            f"{type(model).__name__} does not name its blocks (_no_split_modules), which FSDP2 "
            "shards one by one",
            remedies.DDP,
            remedies.ONE_DEVICE,
        )
    for block in reversed(blocks):  # so that a block inside another comes first
        fully_shard(block, mesh=mesh, **options)
    # The root's weights are the last that forward uses and the first that backward needs, so they
    # are not resharded in between.
    fully_shard(model, mesh=mesh, **{**options, "reshard_after_forward": False})
    for module in model.modules():
        if isinstance(module, SubspaceLayer):  # move it to its buffers' device
            module.energy.data = module.energy.data.to(module.basis.device)
    setattr(model, _GATHERED, types.MethodType(_call, model))
    register_fsdp_forward_method(model, _GATHERED)


def with_root_gathered(model: nn.Module, function: Callable[..., T], *args: Any) -> T:
    """Call `function(*args)` as if it were `model`'s forward pass.

    FSDP2 gathers the root module's weights in the model's own forward pass. A function that uses
    parts of a model, such as its transformer or its head's weight, does not call that forward pass.
    Call such a function through this one.

    Args:
        model: The model, sharded or not.
        function: The function to call, which may use the weights of `model`.
        *args: The positional arguments of `function`.
    """
    root = fsdp_root(model)
    if root is None:
        return function(*args)
    result: T = getattr(root, _GATHERED)(function, *args)
    if not torch.is_grad_enabled():
        root.reshard()  # with gradients, the backward pass reshards
    return result


def _call(model: nn.Module, function: Callable[..., T], *args: Any) -> T:
    return function(*args)
