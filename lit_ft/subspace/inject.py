"""Put a model's layers into their subspaces."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import get_args

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from lit_ft.compat.layer_names import counted_names
from lit_ft.compat.plan import Adapter, Basis, Plan
from lit_ft.compat.rules import check
from lit_ft.subspace.checks import check_dtype
from lit_ft.subspace.layers.base import Sides, SubspaceLayer
from lit_ft.subspace.layers.conv1d import SubspaceConv1D
from lit_ft.subspace.layers.embedding import SubspaceEmbedding
from lit_ft.subspace.layers.head import SubspaceHead
from lit_ft.subspace.layers.linear import SubspaceLinear
from lit_ft.tensors.sharding import is_sharded
from lit_ft.tensors.stochastic_rounding import keyed_generator

log = logging.getLogger(__name__)

TARGETS = {
    "attention": r"(^|\.)\w*(attn|attention)\w*\.",
    "mlp": r"(^|\.)\w*(mlp|ffn|feed_forward|expert)\w*\.",
}
_LARGE_SHARE = 0.1  # of a model; if GaLore cannot train more than that, the log warns


def inject(
    model: nn.Module,
    *,
    rank: int,
    targets: str | Sequence[str] = "all",
    side: Sides = "right",
    seed: int = 0,
    allow_meta: bool = False,
) -> dict[str, SubspaceLayer]:
    """Freeze the weights of the targeted layers and let them move in subspaces of `rank`.

    Call it before the optimizer is built and before the model is sharded, because the `delta` of
    each layer replaces its weight among the trainable parameters. The model's outputs stay the
    same.

    Args:
        model: The model, changed in place; its layers stay the same objects.
        rank: The rank r of the subspaces. In a layer whose shorter side is below r, the rank is
            that side, which is logged. Its basis then spans the whole side and loses nothing.
        targets: The layers to train in subspaces: "all", any of "attention", "mlp", "embeddings"
            and "head", or regular expressions to search for in the names of layers.
        side: The side of a weight that a basis spans: the layer's inputs ("right"), its outputs
            ("left") or the shorter of the two ("std"). Embeddings and the head always use "right".
        seed: The seed of the bases that training starts from.
        allow_meta: Whether weights may still be on the meta device. If so, the loader must fill in
            the weights one by one and not touch `delta` and `basis`, which `to_empty` would empty.

    Returns:
        The layers, keyed by name. Layers that share a weight appear once, under the first name.

    Raises:
        ValueError: If an argument is invalid, if a target matches no layer, if the model has an
            adapter, or if a targeted layer cannot enter a subspace. The message gives the reason:
            the layer may be frozen, float16, quantised, sharded or without values (on the meta
            device), or share its weight with a layer that is not targeted.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank={rank}: give a positive whole number, such as 128.")
    if side not in get_args(Sides):
        raise ValueError(f"side={side}: give right, left or std.")
    if not targets:
        raise ValueError("targets is empty: give all, or leave GaLore out.")
    if any("lora_" in name for name, _ in model.named_parameters()):
        check(Plan(adapter=Adapter(), basis=Basis("")), parts=["galore"])
    chosen = targeted(model, targets)
    _check_targets(model, chosen, allow_meta=allow_meta)
    injected: dict[str, SubspaceLayer] = {}
    by_weight: dict[nn.Parameter, SubspaceLayer] = {}
    heads = _heads(model)
    of_tokens = {
        _weight(module)
        for module in chosen.values()
        if module in heads or isinstance(module, nn.Embedding)
    }
    for index, (name, module) in enumerate(chosen.items()):
        weight = _weight(module)
        twin = by_weight.get(weight)
        layer = _changed_class(module, is_head=module in heads)
        layer.rows_are_tokens = weight in of_tokens
        if twin is not None:
            layer.side, layer.delta, layer.energy = twin.side, twin.delta, twin.energy
            module.register_buffer("basis", twin.basis)
            continue
        capped = min(rank, *weight.shape)
        if capped < rank:
            log.info("%s: rank %d is capped at %d, its smaller side.", name, rank, capped)
        generator = keyed_generator(torch.device("cpu"), seed, index)
        layer.enter_subspace(capped, layer.side_of(side, rank), generator=generator)
        injected[name] = by_weight[weight] = layer
    _keep_out_of_exports(model)
    keep_out_of_broadcasts(model)
    return injected


def keep_out_of_broadcasts(model: nn.Module) -> None:
    """Exclude the bases from DDP's broadcasts; call it before DDP wraps `model`.

    Otherwise DDP would send all buffers of rank 0 before each forward pass. The bases take more
    bytes than the gradients, and they are the same on every rank anyway.
    """
    bases = {name for name in _small_tensors(model) if name.endswith("basis")}
    ignored = {*getattr(model, "_ddp_params_and_buffers_to_ignore", ()), *bases}
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)  # type: ignore[no-untyped-call]


def subspace_layers(model: nn.Module) -> dict[str, SubspaceLayer]:
    """Return the model's subspace layers, keyed by name; layers with one weight appear once."""
    found: dict[nn.Parameter, tuple[str, SubspaceLayer]] = {}
    for name, module in model.named_modules():
        if isinstance(module, SubspaceLayer):
            found.setdefault(module.delta, (name, module))
    return dict(found.values())


def layer_group(name: str, layer: SubspaceLayer) -> str:
    """Return the part of the model that has the layer: embeddings, head, attention, mlp, other."""
    if isinstance(layer, SubspaceEmbedding):
        return "embeddings"
    if isinstance(layer, SubspaceHead):
        return "head"
    return next((group for group, pattern in TARGETS.items() if re.search(pattern, name)), "other")


def targeted(model: nn.Module, targets: str | Sequence[str]) -> dict[str, nn.Module]:
    """Return the layers that `targets` selects, keyed by name, whether in a subspace or not.

    Args:
        model: The model whose layers to search.
        targets: The layers to select: "all", any of "attention", "mlp", "embeddings" and "head", or
            regular expressions to search for in the names of layers.

    Raises:
        ValueError: If a target matches no layer, or is not a regular expression.
    """
    targets = [targets] if isinstance(targets, str) else list(targets)
    embeddings, heads = _embeddings(model), _heads(model)
    of_tokens = embeddings | heads
    known = {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter)  # under weight_norm it is not
        # In a transformer, only the token embedding. Position embeddings have few rows, and are
        # looked up once for all sequences of a batch, so no gradient per sequence exists.
        and (not isinstance(module, nn.Embedding) or not embeddings or module in embeddings)
        and _fits(module)
    }
    chosen: dict[str, nn.Module] = {}
    for target in targets:
        pattern = _pattern(target)
        matched = {
            name: module
            for name, module in known.items()
            if target == "all"
            or (target == "embeddings" and module in embeddings)
            or (target == "head" and module in heads)
            or (
                target not in ("all", "embeddings", "head")
                and module not in of_tokens
                and pattern.search(name)
            )
        }
        if not matched:
            others = [t for t in ("all", *TARGETS, "embeddings", "head") if t != target]
            raise ValueError(
                f"No layer matches the target '{target}': give {', '.join(others)}, or a regular "
                f"expression. There are {counted_names(known, near=[target])}."
            )
        chosen |= matched
    _tell_of_unknown(model, known)
    return {name: module for name, module in known.items() if name in chosen}


def _fits(module: nn.Module) -> bool:
    return (
        type(module) is nn.Linear
        or isinstance(module, SubspaceLayer)
        or SubspaceConv1D.fits(module)
        or SubspaceEmbedding.fits(module)
    )


def _pattern(target: str) -> re.Pattern[str]:
    try:
        return re.compile(TARGETS.get(target, target))
    except re.error as error:
        raise ValueError(f"The target {target!r} is not a regular expression: {error}.") from error


def _tell_of_unknown(model: nn.Module, known: dict[str, nn.Module]) -> None:
    """Log the matrices that no target can select; warn if they are a large share of the model."""
    seen = {_weight(module) for module in known.values()}
    unknown: dict[str, int] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 2 and parameter not in seen and prefix not in known:
                seen.add(parameter)
                full_name = f"{prefix}.{name}".removeprefix(".").removesuffix(".weight")
                unknown[f"{full_name} ({type(module).__name__})"] = parameter.numel()
    if unknown:
        share = sum(unknown.values()) / sum(p.numel() for p in model.parameters())
        log.log(
            logging.WARNING if share > _LARGE_SHARE else logging.INFO,
            "Trained as ordinary parameters, because GaLore does not know the types of their "
            "layers: %s; %.1f %% of the model.",
            ", ".join(unknown),
            100 * share,
        )


def _check_targets(model: nn.Module, chosen: dict[str, nn.Module], *, allow_meta: bool) -> None:
    """Raise ValueError if a targeted layer cannot enter a subspace, or only with another layer."""
    weights = {_weight(module): name for name, module in chosen.items()}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if name not in chosen and isinstance(weight, nn.Parameter) and weight in weights:
            if not _fits(module):
                raise ValueError(
                    f"{name} ({type(module).__name__}) shares its weight with {weights[weight]}, "
                    "and GaLore cannot tell how it uses the weight: target attention and mlp, "
                    "which leaves both out."
                )
            raise ValueError(
                f"{name} shares its weight with {weights[weight]}, and only the latter is "
                "targeted: target both (embeddings and head) or neither."
            )

    for name, module in chosen.items():
        if reason := _obstacle(module, allow_meta=allow_meta):
            raise ValueError(f"{name} {reason}.")
        check_dtype(name, _weight(module))


def _obstacle(module: nn.Module, *, allow_meta: bool) -> str | None:
    """Return why a layer cannot enter a subspace and what to do about it; None if it can."""
    weight = _weight(module)
    if isinstance(module, SubspaceLayer):
        return "is in a subspace already: call inject once"
    if not weight.is_floating_point():
        return (
            "has a quantised weight, which cannot move: load the model without quantisation, or "
            "leave the layer out of the targets"
        )
    if is_sharded(weight):
        return (
            "is sharded already: call inject first, then let fully_shard spread the weights and "
            "the small parameters over the ranks"
        )
    if weight.is_meta and not allow_meta:
        return "has no values yet (it is on the meta device): load it first"
    if "forward" in vars(module):
        return (
            "has a forward method of its own (accelerate's hooks set one), which knows nothing of "
            "subspaces: remove the method, or leave the layer out of the targets"
        )
    if not weight.requires_grad:
        return "is frozen: unfreeze it, or leave it out of the targets"
    if isinstance(module, nn.Embedding) and (
        module.max_norm is not None or module.scale_grad_by_freq or module.sparse
    ):
        return (
            "uses max_norm, scale_grad_by_freq or sparse gradients, which are not supported in a "
            "subspace: leave embeddings out of the targets"
        )
    return None


def _changed_class(module: nn.Module, *, is_head: bool) -> SubspaceLayer:
    """Turn `module` into a subspace layer in place, so that references to it stay valid."""
    kind: type[nn.Module]
    if isinstance(module, nn.Embedding):
        kind = SubspaceEmbedding.around(type(module))
    elif isinstance(module, nn.Linear):
        kind = SubspaceHead if is_head else SubspaceLinear
    else:
        kind = SubspaceConv1D
    module.__class__ = kind
    assert isinstance(module, SubspaceLayer)
    return module


def _keep_out_of_exports(model: nn.Module) -> None:
    """Make `save_pretrained` leave out deltas and bases, in each transformers model in `model`."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            ignored = {*(part._keys_to_ignore_on_save or ()), *_small_tensors(part)}
            vars(part)["_keys_to_ignore_on_save"] = ignored


def _small_tensors(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if isinstance(module, SubspaceLayer):
            prefix = f"{name}." if name else ""
            yield from (f"{prefix}delta", f"{prefix}basis")


def _weight(module: nn.Module) -> nn.Parameter:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _embeddings(model: nn.Module) -> set[nn.Module]:
    """Return the token embeddings of each transformers model in `model`, itself included."""
    return _of_transformers(model, "get_input_embeddings")


def _heads(model: nn.Module) -> set[nn.Module]:
    return _of_transformers(model, "get_output_embeddings")


def _of_transformers(model: nn.Module, getter: str) -> set[nn.Module]:
    found: set[nn.Module] = set()
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            with suppress(NotImplementedError):  # a part without embeddings
                found.add(getattr(part, getter)())
    return found - {None}
