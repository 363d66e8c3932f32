"""Errors of reading a model that say which model it is.

A model's files may be damaged or anyone's. The libraries that read them raise errors of all kinds,
such as KeyError, which tell a user nothing without a traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from lit_ft.storage.plain_values import plain_weights

_LONGEST = 500  # characters of a library's message


@contextmanager
def model_errors_name(model: str | Path) -> Iterator[None]:
    """Raise ValueError if a model or tokenizer that is loaded in the block cannot be read.

    Args:
        model: The folder or the name of the model, for the message.

    Raises:
        ValueError: If the weights are more than tensors, or in place of a library's error. Errors
            of the machine, such as OSError or memory that ran out, and those of a process that
            waits for other ranks stay as they are.
    """
    try:
        with plain_weights(model):
            yield
    except (ValueError, OSError, MemoryError):
        raise
    except Exception as error:
        if "memory" in str(error) or (dist.is_available() and dist.is_initialized()):
            raise
        if isinstance(error, ImportError):
            missing = str(error).strip().partition("\n")[0].rstrip(".")
            raise ValueError(f"{model} needs what cannot be imported here: {missing}.") from error
        said = f"{type(error).__name__}: {str(error)[:_LONGEST]}".rstrip(": .\n")
        raise ValueError(
            f"{model}: the model or its tokenizer cannot be read ({said}). Take a whole copy of it."
        ) from error
