"""Checkpoint files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lit_ft.storage.atomic import remove, replace_atomically, temporary_path
from lit_ft.storage.checkpoint_folder import CheckpointFolder


class AtomicCheckpointIO(TorchCheckpointIO):
    """Save beside the target, flush to disk, then rename: a torn save leaves the old file.

    Lightning's own saving goes through the system's temporary folder, which may be another
    filesystem: there a rename is a copy, and a crash leaves half a file. A temporary file left by a
    killed process is overwritten by the next save. Loading is restricted to tensors and plain
    values (`weights_only=True`) unless the caller asks otherwise, and takes the folders that
    `FSDP2Strategy` saves too, into the memory of one process. Local paths only.

    Use: `Trainer(plugins=[AtomicCheckpointIO()])`.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write `checkpoint` to `path`.

        Raises:
            OSError: it could not be written, with the reason; what was at `path` is intact and no
                temporary file is left.
            TypeError: `storage_options` was given.
        """
        if storage_options is not None:
            raise TypeError(f"{type(self).__name__} writes local files, without storage_options.")
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
                f"Cannot write the checkpoint {target}: {_reason(error)}. The file before it, if "
                "any, is intact. Make room or choose another folder."
            ) from error
        finally:
            remove(temporary)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint, without running code from it unless `weights_only=False`."""
        if Path(path).is_dir():
            return CheckpointFolder(path).load_whole()
        safe = True if weights_only is None else weights_only
        return super().load_checkpoint(path, map_location, safe)


def _reason(error: BaseException) -> str:
    while not isinstance(error, OSError) and error.__context__ is not None:
        error = error.__context__
    return str(error).splitlines()[0]
