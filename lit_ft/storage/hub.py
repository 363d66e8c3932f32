"""Ask once whether the Hugging Face Hub can be reached, and spare its libraries to find out.

They try each file of a repository several times with pauses between, which takes up to a minute.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub import constants

_SECONDS = 2.0  # to connect


def why_unreachable() -> str | None:
    """Return why the hub cannot be reached; None if it can."""
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    return _why_no_connection(constants.ENDPOINT)


@cache
def _why_no_connection(endpoint: str) -> str | None:
    """Return why there is no connection to a host, or to the proxy that leads to it."""
    url = urlsplit(endpoint)
    host = url.hostname or ""
    proxy = None if proxy_bypass(host) else getproxies().get(url.scheme)
    first = urlsplit(proxy if proxy is None or "//" in proxy else f"//{proxy}") if proxy else url
    port = first.port or (443 if first.scheme == "https" else 80)
    try:
        socket.create_connection((first.hostname or "", port), timeout=_SECONDS).close()
    except OSError as error:
        return f"no connection to {first.hostname}: {error}"
    return None


@contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """Let the hub's libraries look only into their caches if the hub cannot be reached."""
    if why_unreachable() is None:
        yield
        return
    readers = [constants, sys.modules.get("datasets.config")]
    before = [(one, one.HF_HUB_OFFLINE) for one in readers if one is not None]
    try:
        for one, _ in before:
            one.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
        yield
    finally:
        for one, value in before:
            one.HF_HUB_OFFLINE = value  # type: ignore[attr-defined]
