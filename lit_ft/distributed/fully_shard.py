"""Spread a transformer over ranks, block by block (FSDP2, torch's `fully_shard`)."""

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
from lit_ft.subspace import SubspaceLayer
from lit_ft.tensors.sharding import fsdp_root

T = TypeVar("T")
_GATHERED = "with_root_gathered"


def fully_shard_model(model: nn.Module, mesh: DeviceMesh, **options: Any) -> None:
    """Let each rank of `mesh` hold a part of every parameter of `model`, in place.

    One block's weights come together at a time; what is in no block (embeddings, the last norm,
    the head) does around the whole forward and backward pass.

    Args:
        model: A transformers model, with its values or still on the meta device.
        mesh: Of data-parallel ranks.
        **options: For `fully_shard`, e.g. `reshard_after_forward`, `mp_policy`, `offload_policy`.

    Raises:
        Refusal: The model does not say what its blocks are.
    """
    block_names = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in block_names]
    if not blocks:
        raise Refusal(
            f"{type(model).__name__} does not name its blocks (_no_split_modules), which FSDP2 "
            "shards one by one",
            remedies.DDP,
            remedies.ONE_DEVICE,
        )
    for block in reversed(blocks):  # one inside another comes first
        fully_shard(block, mesh=mesh, **options)
    # The root is the last to come together and the first that backward needs again.
    fully_shard(model, mesh=mesh, **{**options, "reshard_after_forward": False})
    for module in model.modules():
        if isinstance(module, SubspaceLayer):  # to where the buffers have gone
            module.energy.data = module.energy.data.to(module.basis.device)
    setattr(model, _GATHERED, types.MethodType(_call, model))
    register_fsdp_forward_method(model, _GATHERED)


def with_root_gathered(model: nn.Module, function: Callable[..., T], *args: Any) -> T:
    """Call `function(*args)` as if it were `model`'s forward pass.

    What works on parts of a model (its transformer, its head's weight) does not go through the
    model's own forward pass, around which FSDP2 brings the root's weights together.
    """
    root = fsdp_root(model)
    if root is None:
        return function(*args)
    result: T = getattr(root, _GATHERED)(function, *args)
    if not torch.is_grad_enabled():
        root.reshard()  # which otherwise the backward pass does
    return result


def _call(model: nn.Module, function: Callable[..., T], *args: Any) -> T:
    return function(*args)
