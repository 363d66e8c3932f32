"""Tables of classes that are refused, by their names: what is not installed needs no import."""

from __future__ import annotations

import re
from collections.abc import Mapping


def reason_against(kind: type, reasons: Mapping[str, str | None]) -> str | None:
    """Return why `kind` is refused, or None.

    Args:
        kind: A class. The first of it and its bases that a pattern fits decides.
        reasons: Patterns (regular expressions, searched in "module.Class") and reasons; None where
            what fits is allowed, whatever its bases are.
    """
    for base in kind.__mro__:
        name = f"{base.__module__}.{base.__qualname__}"
        for pattern, reason in reasons.items():
            if re.search(pattern, name):
                return reason
    return None
