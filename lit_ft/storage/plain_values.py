"""Load files that hold only tensors and plain values, and say what is wrong with others.

torch's own errors advise loading such a file without protection, or admitting what it names. Either
may run code that the file brings, so none of that text reaches a user.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_NAMED = re.compile(r"GLOBAL (\S+) (?:was not an allowed global|whose module)")
_OBJECTS = ("Can only build", "Can only create new object", "unrecognized function", "imported to")
_ADVICE = ("weights_only", "weights only", "safe_globals")


def load_plain(path: str | Path, **options: Any) -> Any:
    """Return what `torch.save` wrote to a file. No code from the file is run.

    Args:
        path: The file.
        **options: Options of `torch.load`, such as `mmap`. The tensors are loaded to the CPU if
            there is no `map_location`.

    Raises:
        ValueError: If the file is broken, or holds objects other than tensors and plain values.
    """
    try:
        return torch.load(path, **{"map_location": "cpu", **options, "weights_only": True})
    except (OSError, MemoryError):
        raise
    except Exception as error:  # broken pickles raise errors of many kinds
        raise refusal(path, error) from None  # its text would advise to run the file's code


@contextmanager
def plain_weights(model: str | Path) -> Iterator[None]:
    """Raise ValueError if weights that are loaded in the block are more than tensors.

    Args:
        model: The folder or the name of the model, for the message.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"Refusing to read the weights of {model}: {reason_of(error)}. Take a copy of the "
            "model that has safetensors files, which can hold no code."
        ) from None


def refusal(path: str | Path, error: BaseException) -> ValueError:
    """Return the error for a file that is not read: what it holds, and what to do."""
    return ValueError(
        f"Refusing to read {path}: {reason_of(error)}. Take a checkpoint that lit_ft has saved. If "
        "you trust the source of this one, load it in a program of your own, and save its tensors "
        "and plain values alone."
    )


def reason_of(error: BaseException) -> str:
    """Return what torch found wrong in a file, without its advice and without a full stop."""
    text = str(error)
    if named := _NAMED.search(text):
        return f"it names {named[1]}, which is neither a tensor nor a plain value"
    if "TorchScript" in text:
        return "it is a TorchScript archive, which holds code"
    if any(part in text for part in _OBJECTS):
        return "it holds objects other than tensors and plain values"
    if not text or any(part in text.lower() for part in _ADVICE):
        return "the pickle in it is broken"
    return text.partition("\n")[0].rstrip(". ")
