"""The one rule of what a secret is, and how it is kept out of everything that a run leaves.

A value is a secret if its setting's name says so, if it has the shape of a known kind of key, if it
is a URL with a password, or if a variable of the environment holds it under the name of a secret.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from lit_ft.run.output import rewrite_output

MASK = "***"
"""What stands in place of a secret."""

OWN_VARIABLES = "LIT_FT_SECRET_"
"""How the variables begin that hold the secrets of the command line and of configuration files."""

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_ALWAYS = re.compile(
    r"password|passwords|passwd|passphrase|secrets?|credentials?|apikey|authorization|bearer"
)
# Words ahead of "key" and "token" that make the name one of a secret: `pad_token` is none.
_OF_KEYS = re.compile(r"api|access|private|secret|signing|encryption|account|auth")
_OF_TOKENS = re.compile(
    r"api|access|auth|bearer|bot|github|gitlab|hf|hub|huggingface|refresh|security|session|user"
    r"|wandb"
)
_SOMETIMES = ("auth", "key", "token")  # if the value looks random
_REFERENCE = re.compile(r"\$\{[^{}]*\}")
_RANDOM = re.compile(r"(?=.*\d)(?=.*[A-Za-z])[\w+=.~:-][\w+/=.~:-]{15,}")
_BITS = 3.0  # of entropy in a character: names of columns and files have less, or have no digits
_SHAPES = re.compile(
    r"hf_[A-Za-z0-9]{16,}|\bsk-(?=[\w-]*\d)[\w-]{16,}|gh[opsu]_[A-Za-z0-9]{16,}"
    r"|github_pat_\w{16,}|glpat-[\w-]{16,}|\b(?:AKIA|ASIA)[0-9A-Z]{12,}|xox[a-z]-[\w-]{10,}"
    r"|AIza[\w-]{30,}|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{5,}"
)
_PASSWORD = re.compile(r"(?<=://)([^\s/:@]*:)([^\s/]+)(?=@[^\s@])")
_USER = re.compile(r"(?<=://)([^\s/:@]{16,})(?=@[^\s@])")
_PARAMETER = re.compile(r"([?&]([\w.-]+)=)([^&\s#'\"]+)")
_SHORTEST = 8  # characters of a variable's value that is looked for in texts
_SHORTEST_OWN = 6


def redacted(node: Any, name: str = "") -> Any:
    """Return a copy of plain values without their secrets.

    Args:
        node: A dict, a list or a value, such as a configuration.
        name: The names that lead to `node`, joined by dots.
    """
    if isinstance(node, Mapping):
        return {key: redacted(value, f"{name}.{key}") for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [redacted(value, name) for value in node]
    if is_secret_by_name(name, node):
        return MASK
    return redacted_text(node) if isinstance(node, str) else node


def redacted_text(text: str) -> str:
    """Return a text, such as an error message, with `***` in place of each secret in it."""
    for secret in _of_the_environment():
        if secret in text:
            # Inside a word, a short one is more likely to be a part of that word.
            edge = r"(?<![A-Za-z0-9]){}(?![A-Za-z0-9])" if len(secret) < _SHORTEST else "{}"
            text = re.sub(edge.format(re.escape(secret)), MASK, text)
    text = _SHAPES.sub(MASK, text)
    if "://" in text:
        text = _PASSWORD.sub(_without_password, text)
        text = _USER.sub(lambda found: MASK if _looks_random(found[1]) else found[1], text)
        text = _PARAMETER.sub(_without_parameter, text)
    return text


def is_secret(name: str, value: Any) -> bool:
    """Return whether the value of a setting is a secret, or holds one.

    Args:
        name: The full name of the setting, such as `logger.wandb.api_key`.
        value: Its value. An interpolation, such as `${oc.env:HF_TOKEN}`, is no secret.
    """
    text = str(value)
    if value is None or _REFERENCE.fullmatch(text):
        return False
    return is_secret_by_name(name, value) or redacted_text(text) != text


def is_secret_by_name(name: str, value: Any) -> bool:
    """Return whether a setting of this name holds a secret, if it has this value."""
    own = name.rpartition(".")[2]
    if value in (None, "", MASK) or isinstance(value, bool) or own.startswith("_"):
        return False
    if _REFERENCE.fullmatch(str(value)):
        return False
    if any(_names_secret(part) for part in name.split(".")):
        return True
    words = [word.lower() for word in _WORD.findall(own)]
    return any(map(words.count, _SOMETIMES)) and isinstance(value, str) and _looks_random(value)


class RedactingFormatter(logging.Formatter):
    """Formats a record of a log, its traceback included, without the secrets in it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record."""
        return redacted_text(super().format(record))


def redact_output() -> None:
    """Leave secrets out of everything that this process prints from now on."""
    rewrite_output(redacted_text)


def _names_secret(name: str) -> bool:
    words = [word.lower() for word in _WORD.findall(name)]
    if words == ["token"] or any(map(_ALWAYS.fullmatch, words)):
        return True
    before = {"key": _OF_KEYS, "token": _OF_TOKENS}
    return any(
        last in before and before[last].fullmatch(ahead)
        for ahead, last in zip(words, words[1:], strict=False)
    )


def _of_the_environment() -> Iterator[str]:
    """Yield the secrets that variables of the environment hold, the longest first."""
    found = {
        value
        for name, value in os.environ.items()
        if len(value) >= (_SHORTEST_OWN if name.startswith(OWN_VARIABLES) else _SHORTEST)
        and (name.startswith(OWN_VARIABLES) or _is_secret_variable(name, value))
    }
    yield from sorted(found, key=len, reverse=True)


@cache
def _is_secret_variable(name: str, value: str) -> bool:
    if os.path.exists(value):  # such as the path of a file that holds a key
        return False
    return is_secret_by_name(name, value) or name.endswith(("_TOKEN", "_PASS"))


def _looks_random(text: str) -> bool:
    if _RANDOM.fullmatch(text) is None:
        return False
    shares = [count / len(text) for count in Counter(text).values()]
    return -sum(share * math.log2(share) for share in shares) >= _BITS


def _without_password(found: re.Match[str]) -> str:
    return found[0] if found[2].startswith("${") else f"{found[1]}{MASK}"


def _without_parameter(found: re.Match[str]) -> str:
    is_one = is_secret_by_name(found[2], found[3]) or "signature" in found[2].lower()
    return f"{found[1]}{MASK}" if is_one else found[0]
