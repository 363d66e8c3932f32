"""Save and load the checkpoint of a sharded model; each rank handles its part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from lit_ft.optim.blocks import frozen
from lit_ft.storage.atomic import remove, replace_atomically, sync_folder, temporary_path
from lit_ft.storage.checkpoint_folder import CheckpointFolder, write_parts, write_rest
from lit_ft.storage.damage import write_checksums
from lit_ft.storage.plain_values import load_plain
from lit_ft.tensors.sharding import shard_like

# What torch's checkpoint_wrapper adds to the names of parameters, but not to those of their state.
_WRAPPER = "_checkpoint_wrapped_module."


def save_parts(checkpoint: dict[str, Any], target: Path) -> None:
    """Save Lightning's `checkpoint` as the folder `target`; call it on every rank.

    The earlier checkpoint at `target` stays until the new folder is complete.

    Raises:
        OSError: On all ranks, if one of them could not write.
    """
    rest = dict(checkpoint)
    parts = {"state_dict": rest.pop("state_dict")}
    for index, state in enumerate(rest.pop("optimizer_states", [])):
        parts[f"optimizer_{index}"] = state
    folder = temporary_path(target)

    def begin() -> None:
        remove(folder)
        folder.mkdir(parents=True)

    def finish() -> None:
        write_rest(rest, folder)
        write_checksums(folder)
        sync_folder(folder)
        replace_atomically(folder, target)

    try:
        _on_first_rank(begin)
        write_parts(parts, folder)
        _on_first_rank(finish)
    except OSError as error:
        if dist.get_rank() == 0:
            remove(folder)
        raise OSError(
            f"Cannot write the checkpoint {target}: {error}. The previous one, if any, is intact. "
            "Free some space or choose another folder."
        ) from error


def load_parts(
    path: Path,
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    *,
    weights_only: bool | None = None,
) -> dict[str, Any]:
    """Load the checkpoint folder `path` into `module` and `optimizers`; return its other entries.

    Call this on every rank. Each rank reads its part of the sharded tensors, however many ranks
    saved the checkpoint.

    Raises:
        KeyError: If there are optimizers, and the checkpoint holds only weights.
        RuntimeError: If the checkpoint belongs to another model or optimizer.
        ValueError: If the checkpoint is broken, or holds objects other than tensors and plain
            values.
    """
    folder = CheckpointFolder(path)
    rest = folder.load_rest(weights_only=weights_only is not False)
    if optimizers and not folder.has_optimizers:
        raise _of_the_model_alone(path)
    saved = folder.tensors("state_dict.")
    weights = {
        name: weight
        for name, weight in get_model_state_dict(module).items()
        if f"state_dict.{name}" in saved
    }
    folder.load({"state_dict": weights})
    module.load_state_dict(weights)  # the module knows which weights may be left out
    for index, optimizer in enumerate(optimizers):
        name = f"optimizer_{index}"
        with _without_state(module, partial(_holds_state, folder, name)):
            state: dict[str, Any] = {name: get_optimizer_state_dict(module, optimizer)}
            folder.load(state)
            set_optimizer_state_dict(module, optimizer, optim_state_dict=state[name])
    return rest


def load_file(
    path: Path,
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    *,
    weights_only: bool | None = None,
) -> dict[str, Any]:
    """Load the checkpoint file `path`, otherwise as `load_parts` does.

    The file may have been saved by one process or by any number of ranks.

    Raises:
        KeyError: If there are optimizers, and the checkpoint holds only weights.
        RuntimeError: If the checkpoint belongs to another model or optimizer.
        ValueError: If the checkpoint is broken, or holds objects other than tensors and plain
            values.
    """
    checkpoint: dict[str, Any]
    if weights_only is False:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    else:
        checkpoint = load_plain(path, mmap=True)
    if optimizers and "optimizer_states" not in checkpoint:
        raise _of_the_model_alone(path)
    spread = get_model_state_dict(module)
    saved = checkpoint.pop("state_dict")
    module.load_state_dict(
        {name: shard_like(value, spread.get(name, value)) for name, value in saved.items()}
    )
    states = checkpoint.pop("optimizer_states", [])
    for optimizer, state in zip(optimizers, states, strict=bool(optimizers)):
        by_names = _by_names(state, optimizer, module)
        with _without_state(module, by_names["state"].__contains__):
            set_optimizer_state_dict(
                module,
                optimizer,
                optim_state_dict=by_names,
                options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
            )
    return checkpoint


def _by_names(state: dict[str, Any], optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """Return an optimizer's saved `state`, keyed by parameter names instead of numbers."""
    named = {parameter: name for name, parameter in module.named_parameters()}
    mine, groups = optimizer.param_groups, state["param_groups"]
    if [len(group["params"]) for group in mine] != [len(group["params"]) for group in groups]:
        raise RuntimeError(
            "Error in loading state_dict for an optimizer: its groups differ from the saved ones."
        )
    names: dict[int, str] = {}
    for group, saved in zip(mine, groups, strict=True):
        names |= dict(zip(saved["params"], (named[p] for p in group["params"]), strict=True))
    return {
        "state": {names[number]: values for number, values in state["state"].items()},
        "param_groups": [
            {**group, "params": [names[number] for number in group["params"]]} for group in groups
        ],
    }


def _holds_state(folder: CheckpointFolder, optimizer: str, parameter: str) -> bool:
    return folder.holds(f"{optimizer}.state.{parameter}.")


@contextmanager
def _without_state(module: nn.Module, has_state: Callable[[str], bool]) -> Iterator[None]:
    """Freeze the parameters without optimizer state in a checkpoint, inside the block.

    torch would make a state for each trainable parameter, and then miss it in the checkpoint. Block
    updates save the state of the active blocks alone. Without any state, nothing is frozen: the
    checkpoint may be one of another optimizer, and torch says so.

    Args:
        module: The module that is loaded into.
        has_state: The function that says whether the checkpoint has state of a parameter, by name.
    """
    trainable = {
        name.replace(_WRAPPER, ""): p for name, p in module.named_parameters() if p.requires_grad
    }
    absent = [p for name, p in trainable.items() if not has_state(name)]
    with frozen(absent if len(absent) < len(trainable) else ()):
        yield


def _of_the_model_alone(path: Path) -> KeyError:
    return KeyError(
        f"{path} holds the model alone, and no optimizer state to continue with: resume from "
        "last.ckpt."
    )


def _on_first_rank(action: Callable[[], None]) -> None:
    """Run `action` on rank 0; if it fails, raise OSError on all ranks."""
    failed: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except (OSError, RuntimeError) as error:  # torch wraps a failed write in a RuntimeError
            failed = [str(error).partition("\n")[0]]
    dist.broadcast_object_list(failed)
    if failed[0] is not None:
        raise OSError(failed[0])
