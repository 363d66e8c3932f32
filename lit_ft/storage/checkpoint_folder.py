"""Checkpoints that several ranks write: folders in torch.distributed.checkpoint's format.

The files of the ranks hold `state_dict` and `optimizer_0`. The file `meta.pt` holds everything else
of a Lightning checkpoint. Reading runs no code from the folder, unless `weights_only=False` is
passed.
"""

from __future__ import annotations

import io
import os
import pathlib
import pickle
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint._nested_dict import flatten_state_dict, unflatten_state_dict
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from lit_ft.storage.plain_values import load_plain, refusal

META = "meta.pt"  # Lightning's name

_CLASSES: tuple[Any, ...] = (
    metadata.BytesStorageMetadata,
    metadata.ChunkStorageMetadata,
    metadata.Metadata,
    metadata.MetadataIndex,
    metadata.StorageMeta,
    metadata.TensorProperties,
    metadata.TensorStorageMetadata,
    metadata._MEM_FORMAT_ENCODING,
    filesystem._StorageInfo,
    torch.Size,
    torch.serialization._get_layout,
)
_ADMITTED: dict[tuple[str, str], Any] = {
    **{(each.__module__, each.__qualname__): each for each in _CLASSES},
    **{("torch", name): value for name, value in vars(torch).items() if type(value) is torch.dtype},
    # The path that the checkpoint was saved to, which is not used.
    **{(module, "PosixPath"): pathlib.PurePosixPath for module in ("pathlib", "pathlib._local")},
}


def write_parts(state: dict[str, Any], folder: Path) -> None:
    """Write `state`, with each rank writing its part of sharded tensors; call it on every rank.

    Tensors on a GPU are copied to the host one by one.

    Raises:
        OSError: On all ranks, if one of them could not write.
    """
    try:
        save(state, storage_writer=FileSystemWriter(folder))
    except CheckpointException as error:
        raise OSError(str(_first_cause(error)).partition("\n")[0]) from error


def write_rest(checkpoint: dict[str, Any], folder: Path) -> None:
    """Write `checkpoint`, which holds all that `write_parts` does not; call it on one rank."""
    with (folder / META).open("wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())


class CheckpointFolder:
    """A checkpoint that several ranks wrote, opened for reading by any number of processes.

    Args:
        path: The folder of the checkpoint.

    Raises:
        ValueError: If `path` is not a complete checkpoint folder, or if its `.metadata` file is
            broken or names a class that no checkpoint needs.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        file = self.path / ".metadata"
        if not file.is_file() or not (self.path / META).is_file():
            raise ValueError(
                f"{path} is not a complete checkpoint, which has .metadata and {META}: choose "
                "another one."
            )
        with file.open("rb") as stream:
            try:
                self.metadata: Metadata = _MetadataUnpickler(stream).load()
                self._saved = dict(self.metadata.state_dict_metadata)
            except Exception as error:  # broken pickles raise errors of many kinds
                raise ValueError(f"Refusing to read {file}: {error}") from error

    @property
    def has_optimizers(self) -> bool:
        """Whether the checkpoint holds optimizer state, which training needs to resume."""
        return any(name.startswith("optimizer_0.") for name in self._saved)

    def holds(self, prefix: str) -> bool:
        """Whether the name of anything that is saved starts with `prefix`."""
        return any(name.startswith(prefix) for name in self._saved)

    def tensors(self, prefix: str) -> dict[str, TensorStorageMetadata]:
        """Return the size and dtype of each saved tensor whose name starts with `prefix`."""
        return {
            name: entry
            for name, entry in self._saved.items()
            if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
        }

    def load(self, state: dict[str, Any], *, alone: bool = False) -> None:
        """Fill the tensors in `state` in place, and replace its other entries by the saved values.

        Args:
            state: The entries to load: any part of the saved state, as nested dicts or as a flat
                dict whose keys are names joined by dots. Each rank reads its part of a sharded
                tensor.
            alone: Whether this process reads by itself. Otherwise every rank must call this method.

        Raises:
            RuntimeError: If `state` belongs to another model or optimizer.
            ValueError: If a file is broken, or holds objects other than tensors and plain values.
        """
        if told := self._differences(state):
            raise RuntimeError(f"Error in loading state_dict for {self.path}: {'; '.join(told)}")
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                load(state, storage_reader=_Reader(self), planner=_PlainValues(), no_dist=alone)
        except CheckpointException as error:
            raise refusal(self.path, _first_cause(error)) from None

    def load_whole(self) -> dict[str, Any]:
        """Load the whole checkpoint into this process's memory, as if it were a single file."""
        flat = {name: _room_for(entry) for name, entry in self._saved.items()}
        self.load(flat, alone=True)
        nested = unflatten_state_dict(flat, self.metadata.planner_data)
        checkpoint = {**self.load_rest(), "state_dict": nested.pop("state_dict")}
        if nested:
            checkpoint["optimizer_states"] = [nested[f"optimizer_{i}"] for i in range(len(nested))]
        return checkpoint

    def load_rest(self, *, weights_only: bool = True) -> dict[str, Any]:
        """Return all but weights and optimizer state, such as the states of callbacks and loops.

        Args:
            weights_only: Whether to refuse objects other than tensors and plain values. If False,
                loading may run code from the file.

        Raises:
            ValueError: If the file is broken, or holds objects that are refused.
        """
        file = self.path / META
        if weights_only:
            rest: dict[str, Any] = load_plain(file)
        else:
            rest = torch.load(file, map_location="cpu", weights_only=False)
        return rest

    def _differences(self, state: dict[str, Any]) -> list[str]:
        """Return the differences between `state` and the saved state, worded as torch does."""
        wanted, _ = flatten_state_dict(state)
        weights = self.tensors("state_dict.") if "state_dict" in state else {}
        differences = {
            "Missing key(s)": wanted.keys() - self._saved.keys(),
            "Unexpected key(s)": weights.keys() - wanted.keys(),
            "Other sizes": {
                name
                for name, entry in self.tensors("").items()
                if isinstance(wanted.get(name), Tensor) and wanted[name].shape != entry.size
            },
        }
        return [f"{what}: {_some(names)}" for what, names in differences.items() if names]


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles the classes that a `.metadata` file needs, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        return _ADMITTED[module, name]


class _Reader(FileSystemReader):
    """Uses the metadata that is already loaded; torch's own reader unpickles anything."""

    def __init__(self, folder: CheckpointFolder) -> None:
        super().__init__(folder.path)
        self._metadata = folder.metadata

    def read_metadata(self) -> Metadata:
        return self._metadata


class _PlainValues(DefaultLoadPlanner):
    """Loads only tensors and plain values; torch's own planner unpickles anything."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        place = self.mappings[read_item.dest_index.fqn]
        set_element(self.original_state_dict, place, torch.load(value, weights_only=True))


def _room_for(entry: Any) -> Tensor | None:
    if isinstance(entry, TensorStorageMetadata):
        return torch.empty(entry.size, dtype=entry.properties.dtype)
    return None


def _first_cause(error: CheckpointException) -> BaseException:
    cause, _ = next(iter(error.failures.values()))
    return cause


def _some(names: Iterable[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")
