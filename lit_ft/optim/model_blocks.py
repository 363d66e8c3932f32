"""Find the repeated blocks of a model, and sort its parameters into them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from torch import Tensor, nn

from lit_ft.compat import remedies
from lit_ft.compat.refusal import Refusal

EMBEDDINGS, HEAD = "embeddings", "head"


def declared_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks whose classes a transformers model names, keyed by name.

    It names them in `_no_split_modules`; the model may be a part of `model`. A block may be inside
    another. A model of another kind has none.
    """
    names = {
        name
        for module in model.modules()
        for name in getattr(module, "_no_split_modules", None) or ()
    }
    # `fully_shard` puts a class of its own in front.
    return {
        name: module
        for name, module in model.named_modules()
        if names & {kind.__name__ for kind in type(module).__mro__}
    }


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the outermost repeated blocks of any model, keyed by name, in the model's order.

    They are those that a transformers model declares. In another model, they are the members of
    the largest `ModuleList` or `Sequential` that has two or more members, all of one class. The
    result is empty if there is none.
    """
    for found in (declared_blocks(model), _largest_list(model)):
        outermost = {
            name: module
            for name, module in found.items()
            if not any(name.startswith(f"{other}.") for other in found)
        }
        if len(outermost) > 1:
            return outermost
    return {}


def _largest_list(model: nn.Module) -> dict[str, nn.Module]:
    """Return the members of the list that holds the most weights; the outermost of equals."""
    found: dict[str, nn.Module] = {}
    most = 0
    for prefix, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        members = {f"{prefix}.{name}".lstrip("."): one for name, one in module.named_children()}
        size = sum(p.numel() for p in module.parameters())
        if len(members) > 1 and len(set(map(type, members.values()))) == 1 and size > most:
            found, most = members, size
    return found


@dataclass(frozen=True)
class ModelBlocks:
    """A model's trainable parameters, each in one block or among those that are always trained.

    The parameters of towers without input embeddings are in neither: see `model_blocks`.

    Attributes:
        blocks: The parameters of each block, keyed by the block's name, in the model's order.
        always: The parameters that are trained in every step.
    """

    blocks: Mapping[str, Sequence[Tensor]]
    always: Sequence[Tensor] = ()


def model_blocks(model: nn.Module, always: Iterable[str] = ()) -> ModelBlocks:
    """Sort a model's trainable parameters into blocks.

    The embeddings come first, then the repeated blocks, and then the head. What is in none of them,
    such as the last norm, is small and goes with the head. If the head shares its weight with an
    embedding, both are one block, which comes first. A parameter that blocks share belongs to the
    first of them.

    In a model with several towers, such as one for text and one for images, only the tower that
    holds the input embeddings has blocks, if the model says which embeddings these are
    (`get_input_embeddings`). Text gives the other towers no gradient, so their turns would train
    nothing. Their parameters are in no block: where a loss depends on them, they are trained in
    every step. An encoder and its decoder both have blocks.

    Args:
        model: The model, sharded or not.
        always: What is trained in every step and belongs to no block: "embeddings", "head", or
            regular expressions to search for in the names of parameters.

    Raises:
        Refusal: If the model has no repeated blocks, if an entry of `always` fits nothing, or if
            `always` leaves no block.
    """
    inside = repeated_blocks(model)
    if not inside:
        raise Refusal(
            f"{type(model).__name__} has no repeated blocks: neither `_no_split_modules`, which "
            "names their class, nor a ModuleList or Sequential of several modules of one class",
            remedies.NO_BLOCKS,
        )
    trainable = {name: p for name, p in _named(model) if p.requires_grad}
    blocks: dict[str, list[Tensor]] = {EMBEDDINGS: []}
    others = [model.get_submodule(name) for name in _other_towers(model, inside)]
    taken: set[Tensor] = {p for tower in others for p in tower.parameters()}
    for name, module in inside.items():
        blocks[name] = [p for p in module.parameters() if p.requires_grad and p not in taken]
        taken.update(blocks[name])
    looked_up = _looked_up(model)
    outside = dict.fromkeys(p for p in trainable.values() if p not in taken)
    is_tied = any(p in looked_up for p in outside if _is_used_elsewhere(model, p))
    blocks[EMBEDDINGS] = [p for p in outside if is_tied or p in looked_up]
    blocks[HEAD] = [p for p in outside if not (is_tied or p in looked_up)]
    chosen = _always(always, blocks, trainable, type(model).__name__)
    kept = {name: [p for p in held if p not in chosen] for name, held in blocks.items()}
    left = {name: held for name, held in kept.items() if held}
    if chosen and not left:
        raise Refusal(
            f"always covers every parameter of {type(model).__name__} that could take turns",
            remedies.CORRECT_ALWAYS,
        )
    return ModelBlocks(left, list(chosen))


def _other_towers(model: nn.Module, blocks: Iterable[str]) -> set[str]:
    """Return the names of the towers that have blocks, but not the model's input embeddings."""
    place = _input_embeddings(model)
    while place:
        place = place.rpartition(".")[0]
        if any(name.startswith(f"{place}.") for name in blocks):
            break
    if not place:
        return set()
    own, towers = place.split("."), set()
    for name in blocks:
        if not name.startswith(f"{place}."):
            parts = name.split(".")
            shared = len(commonprefix([own, parts]))
            towers.add(".".join(parts[: shared + 1]))
    return towers


def _input_embeddings(model: nn.Module) -> str:
    """Return the name of the input embeddings; empty if no model, or more than one, names them."""
    naming: dict[str, Any] = {}
    for name, module in model.named_modules():
        is_inside = any(not other or name.startswith(f"{other}.") for other in naming)
        if not is_inside and callable(getattr(module, "get_input_embeddings", None)):
            naming[name] = module
    if len(naming) != 1:
        return ""
    [one] = naming.values()
    if getattr(getattr(one, "config", None), "is_encoder_decoder", False):
        return ""  # each loss depends on both
    try:
        embeddings = one.get_input_embeddings()
    except NotImplementedError:
        return ""
    return next((name for name, module in model.named_modules() if module is embeddings), "")


def _named(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    return model.named_parameters(remove_duplicate=False)


def _looked_up(model: nn.Module) -> set[Tensor]:
    """Return the tables of all embeddings."""
    embeddings = (module for module in model.modules() if isinstance(module, nn.Embedding))
    return {p for module in embeddings for p in module.parameters(recurse=False)}


def _is_used_elsewhere(model: nn.Module, parameter: Tensor) -> bool:
    """Whether a module that is no embedding has the parameter, as a head that is tied to one."""
    others = (module for module in model.modules() if not isinstance(module, nn.Embedding))
    return any(parameter is p for module in others for p in module.parameters(recurse=False))


def _always(
    wanted: Iterable[str],
    blocks: Mapping[str, Sequence[Tensor]],
    trainable: Mapping[str, Tensor],
    model: str,
) -> dict[Tensor, None]:
    """Return the parameters that are trained in every step, each once, in the model's order."""
    found: set[Tensor] = set()
    for entry in wanted:
        if entry in (EMBEDDINGS, HEAD):
            # A head that is tied to an embedding is in the embedding's block.
            fitting = set(blocks[entry] or (blocks[EMBEDDINGS] if entry == HEAD else ()))
        else:
            fitting = {p for name, p in trainable.items() if re.search(entry, name)}
        if not fitting:
            raise Refusal(
                f"always={entry!r} fits no trainable parameter of {model}", remedies.CORRECT_ALWAYS
            )
        found |= fitting
    return dict.fromkeys(p for p in trainable.values() if p in found)
