"""Write checkpoint files that are either complete or absent, and read what is small in them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor

from lit_ft.storage.atomic import remove, replace_atomically, temporary_path
from lit_ft.storage.checkpoint_folder import CheckpointFolder
from lit_ft.storage.plain_values import load_plain


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

    _same: Path | None = None

    @contextmanager
    def may_link_to(self, saved: Path) -> Iterator[None]:
        """In this block, link to `saved` instead of writing the weights that it already holds.

        The two names then share one file, which also holds what else `saved` does. Neither can
        change the other, because files are only ever replaced.
        """
        self._same = saved
        try:
            yield
        finally:
            self._same = None

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
            if not self._is_linked(checkpoint, temporary):
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

    def _is_linked(self, checkpoint: dict[str, Any], temporary: Path) -> bool:
        """Link `temporary` to the file of `may_link_to` if it may be, and return whether it is."""
        if self._same is None or not _holds_weights(self._same, checkpoint["state_dict"]):
            return False
        try:
            os.link(self._same, temporary)
        except OSError:  # a file system without hard links
            return False
        return True

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Load a checkpoint; code from it can run only with `weights_only=False`.

        Raises:
            ValueError: If the checkpoint is broken, or holds objects other than tensors and plain
                values.
        """
        if Path(path).is_dir():
            return CheckpointFolder(path).load_whole()
        if weights_only is False:
            return super().load_checkpoint(path, map_location, weights_only)
        return _entries(path, load_plain(path, map_location=map_location))


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
    checkpoint = _entries(path, load_plain(path, mmap=True))
    large = ("state_dict", "optimizer_states")
    return {name: entry for name, entry in checkpoint.items() if name not in large}


def _holds_weights(path: Path, weights: dict[str, Any]) -> bool:
    """Whether a checkpoint file can be read and holds exactly these weights, bit for bit."""
    try:
        saved = _entries(path, load_plain(path, mmap=True)).get("state_dict", {})
    except (OSError, ValueError):
        return False
    return saved.keys() == weights.keys() and all(
        _is_same(saved[name], weight) for name, weight in weights.items()
    )


def _is_same(saved: Any, value: Any) -> bool:
    if not (isinstance(value, Tensor) and type(value.detach()) is type(saved) is Tensor):
        return False  # the extra state of a module, or a tensor that is no plain one
    return saved.dtype == value.dtype and torch.equal(saved, value.detach().to("cpu"))


def _entries(path: str | Path, loaded: Any) -> dict[str, Any]:
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} is no checkpoint: it holds a {type(loaded).__name__}.")
    return loaded


def _reason(error: BaseException) -> str:
    while not isinstance(error, OSError) and error.__context__ is not None:
        error = error.__context__
    return str(error).splitlines()[0]
