"""Write checkpoint files that are either complete or absent, and read what is small in them."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lit_ft.storage.atomic import remove, replace_atomically, temporary_path
from lit_ft.storage.checkpoint_folder import CheckpointFolder


class AtomicCheckpointIO(TorchCheckpointIO):
    """Save next to the target, flush to disk, then rename: an interrupted save leaves the old file.

    Lightning itself first saves to the system's temporary folder. If that is on another file
    system, the file is then copied, and a crash leaves half a file. With this class, a killed
    process can leave only a temporary file, which the next save overwrites.

    Loading accepts only tensors and plain values, unless the caller passes `weights_only=False`.
    Folders that `FSDP2Strategy` saved can be loaded too; they are read whole into the memory of one
    process. Only local paths are supported.

    Use it as in `Trainer(plugins=[AtomicCheckpointIO()])`.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write `checkpoint` to `path`.

        Raises:
            OSError: If the checkpoint could not be written. The message gives the reason. An
                earlier file at `path` is intact, and no temporary file is left.
            TypeError: If `storage_options` is given.
        """
        if storage_options is not None:
            raise TypeError(
                f"{type(self).__name__} writes local files only: leave storage_options out."
            )
        target = Path(path)
        temporary = temporary_path(target)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            remove(temporary)
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            replace_atomically(temporary, target)
        except (OSError, RuntimeError) as error:  # torch wraps a failed write in a RuntimeError
            raise OSError(
                f"Cannot write the checkpoint {target}: {_reason(error)}. The previous file, if "
                "any, is intact. Free some space or choose another folder."
            ) from error
        finally:
            remove(temporary)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Load a checkpoint; code from it can run only with `weights_only=False`."""
        if Path(path).is_dir():
            return CheckpointFolder(path).load_whole()
        safe = True if weights_only is None else weights_only
        return super().load_checkpoint(path, map_location, safe)


def load_rest(path: str | Path) -> dict[str, Any]:
    """Return all entries of a checkpoint but weights and optimizer state, which stay on disk.

    Args:
        path: The checkpoint: a file, or a folder that several ranks wrote. No code from it is run.

    Raises:
        ValueError: If the checkpoint is broken, or holds objects other than tensors and plain
            values.
    """
    if Path(path).is_dir():
        return CheckpointFolder(path).load_rest()
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"Refusing to read {path}: {error}") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f"Refusing to read {path}: it holds a {type(checkpoint).__name__}, no checkpoint."
        )
    large = ("state_dict", "optimizer_states")
    return {name: entry for name, entry in checkpoint.items() if name not in large}


def _reason(error: BaseException) -> str:
    while not isinstance(error, OSError) and error.__context__ is not None:
        error = error.__context__
    return str(error).splitlines()[0]
