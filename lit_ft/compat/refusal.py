"""The error for a combination that cannot work: the reason, and the remedies as data."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_ROOM = "Free some space, or choose another path."
_RIGHT = "Give yourself the right to it, or choose another path."
# What helps against an error of the machine, by its number.
_AGAINST = {
    errno.EACCES: _RIGHT,
    errno.EPERM: _RIGHT,
    errno.EROFS: "It cannot be written to: choose another path.",
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: _ROOM,
    errno.ENOENT: "Check the path.",
    errno.ENOTDIR: "A part of the path is a file: choose another path.",
    errno.EEXIST: "It is a file: choose another path.",
    errno.EMFILE: "Raise the limit of open files (ulimit -n).",
}


@dataclass(frozen=True)
class Remedy:
    """A change after which a run is no longer refused.

    Attributes:
        python: The change in Python, as an imperative phrase ("use FSDP2Strategy()").
        settings: The change on the command line, as setting names mapped to values
            (`{"strategy": "fsdp"}`); empty if the Python phrase suits the command line too.
        advice: The change on the command line, as an imperative phrase, if no fixed value expresses
            it ("lower optim.lr"); None makes the phrase from `settings`.
    """

    python: str
    settings: Mapping[str, str] = field(default_factory=dict)
    advice: str | None = None

    @property
    def command_line(self) -> str:
        """The change on the command line, as an imperative phrase."""
        if self.advice is not None:
            return self.advice
        if not self.settings:
            return self.python
        return "use " + " ".join(f"{name}={value}" for name, value in self.settings.items())


class Refusal(ValueError):
    """The error for a request that cannot work.

    The error's text gives remedies in Python; `on_command_line` gives them for users of `train.py`.
    Code that has a trainer raises the subclass `lit_ft.distributed.plan.Misconfiguration`, which is
    also Lightning's `MisconfigurationException`.

    Args:
        why: The reason for the refusal, as a sentence without its full stop.
        *remedies: The changes after which the request would work, the closest to the request first.
    """

    def __init__(self, why: str, *remedies: Remedy) -> None:
        super().__init__(why, *remedies)
        self.why = why
        self.remedies = remedies

    def __str__(self) -> str:
        """Return the message with its remedies in Python."""
        return _sentence(self.why, [remedy.python for remedy in self.remedies])

    @property
    def on_command_line(self) -> str:
        """The message with its remedies as settings."""
        return _sentence(self.why, [remedy.command_line for remedy in self.remedies])


def located(error: Exception, place: str) -> ValueError:
    """Return `error` with a location in front of its message; a refusal keeps its remedies.

    Args:
        error: The original error, whose message has no location.
        place: The location of the error, such as `my.jsonl:57`.
    """
    if isinstance(error, Refusal):
        return Refusal(f"{place}: {error.why}", *error.remedies)
    return ValueError(f"{place}: {error}")


def message_on_command_line(error: BaseException) -> str:
    """Return the message of an error for users of the command line."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        remedy = _AGAINST.get(error.errno, "Choose another path.")
        return f"{error.filename}: {os.strerror(error.errno)}. {remedy}"
    return error.on_command_line if isinstance(error, Refusal) else str(error)


def _sentence(why: str, phrases: Sequence[str]) -> str:
    """Add the alternatives to the reason, as in "It is wrong. Use a, b, or leave c out."."""
    # Repeated "use " is written once.
    said = [
        phrase.removeprefix("use ") if before.startswith("use ") else phrase
        for before, phrase in zip(["", *phrases], phrases, strict=False)
    ]
    if not said:
        return f"{why}."
    *first, last = said
    joined = f"{', '.join(first)}{',' * (len(first) > 1)} or {last}" if first else last
    return f"{why}. {joined[0].upper()}{joined[1:]}."
