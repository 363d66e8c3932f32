"""Errors of writing that name the place, also where a library's error does not."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def write_errors_name(place: Path) -> Iterator[None]:
    """Let the errors of a full disk, or one that cannot be written to, name a file or folder.

    safetensors has an error of its own for them, and the system's error names no file once a file
    is open.

    Raises:
        OSError: In place of the original error.
    """
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        raise _named(int(found[1]), place) from error
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise _named(error.errno, place) from error


def _named(number: int, place: Path) -> OSError:
    return OSError(number, os.strerror(number), str(place))
