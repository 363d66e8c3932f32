"""The user's cache folder, for files that are expensive to make but can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """Return `$LIT_FT_CACHE` if it is set, else `lit_ft` in `$XDG_CACHE_HOME` or `~/.cache`."""
    own, shared = os.environ.get("LIT_FT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else Path(shared or Path.home() / ".cache") / "lit_ft"
