"""Where what is expensive to make, and can be made again, is kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """Return `$LIT_FT_CACHE`, or `lit_ft` in the user's cache folder."""
    own, shared = os.environ.get("LIT_FT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else Path(shared or Path.home() / ".cache") / "lit_ft"
