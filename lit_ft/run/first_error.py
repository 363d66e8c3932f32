"""The error that ended a run of several ranks, where one fails and the others follow it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed import DistError

from lit_ft.storage.json_file import read_json, write_json

_OF_AN_END = ("status", "ended", "error")
# What a rank says whose peer has gone, in a plain RuntimeError.
_PEER_GONE = ("closed by peer", "reset by peer", "[gloo", "NCCL", "Broken pipe")


def follows_another(error: BaseException | None) -> bool:
    """Whether an error may be the consequence of another rank's.

    A rank that fails closes its connections, and the launcher then ends the other ranks.
    """
    return (
        error is None
        or isinstance(error, SIGTERMException | DistError)
        or (isinstance(error, RuntimeError) and any(part in str(error) for part in _PEER_GONE))
    )


def add_to_summary(path: Path, end: Mapping[str, Any], *, rank: int) -> None:
    """Write how a rank other than the first ended into the summary, unless it holds an error.

    The first rank may never get to it: it waits for the others, or its launcher kills it.

    Args:
        path: The summary, which the first rank has written at its start.
        end: The fields of the summary that say how this rank ended.
        rank: The number of this rank.
    """
    try:
        found = read_json(path)
        if found.get("error") is None:
            end = {**end, "error": {**end["error"], "rank": rank}}
            new = path.with_name(f".{path.name}.rank{rank}")
            write_json(new, {**found, **end}, indent=2)
            os.replace(new, path)
    except (OSError, ValueError):  # there is none on this machine, or its disk is full
        return


def end_of_another(path: Path) -> dict[str, Any]:
    """Return the fields that another rank has written into the summary; empty if none has."""
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return {}
    error = found.get("error")
    # Another program may have written a text there.
    is_of_another = isinstance(error, dict) and error.get("rank")
    return {name: found.get(name) for name in _OF_AN_END} if is_of_another else {}
