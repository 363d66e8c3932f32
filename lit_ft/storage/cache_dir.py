"""The user's cache folder, for files that are expensive to make but can be made again."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def user_cache() -> Path:
    """Return `$LIT_FT_CACHE` if it is set, else `lit_ft` in `$XDG_CACHE_HOME` or `~/.cache`."""
    own, shared = os.environ.get("LIT_FT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else Path(shared or Path.home() / ".cache") / "lit_ft"


@contextmanager
def written_to_cache() -> Iterator[None]:
    """Name the cache folder and the remedy in the error of a block that cannot write to it.

    Raises:
        OSError: In place of the original error. One that is about another file is left as it is.
    """
    try:
        yield
    except OSError as error:
        named = error.filename is not None and user_cache() in Path(str(error.filename)).parents
        # A library's error of a full disk names no file; only the cache is written to.
        if not named and error.errno not in _NO_ROOM and error.filename != str(user_cache()):
            raise
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise OSError(
            f"The cache folder {user_cache()} cannot be written to: {reason}. Make room in it, "
            "give yourself the right to write to it, or name another folder with "
            "LIT_FT_CACHE=FOLDER in the environment."
        ) from error
