"""Ask whether the Hugging Face Hub can be reached, and spare its libraries to find out.

They try each file of a repository several times with pauses between, which takes up to a minute.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import inf
from typing import Any
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub import constants

_SECONDS = 5.0  # to connect
_PORTS = {"": 80, "http": 80, "https": 443}
_SOCKS = 1080
# A failure is forgotten, so that a notebook that connects can try again. Only one that is waited
# for, as where a firewall drops everything, is believed for a while: a run asks several times.
_FAST = 1.0
_BELIEVED = 30.0
_known: dict[tuple[str, int], tuple[str | None, float]] = {}  # why a host fails, and until when


def why_unreachable() -> str | None:
    """Return why the hub cannot be reached; None if it can."""
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    first = _first_host(constants.ENDPOINT)
    place = first.hostname or "", first.port or _PORTS.get(first.scheme, _SOCKS)
    why, until = _known.get(place, (None, -inf))
    if (began := time.monotonic()) < until:
        return why
    why = _why_no_connection(*place)
    if why is None:
        _known[place] = None, inf
    elif (ended := time.monotonic()) - began > _FAST:
        _known[place] = why, ended + _BELIEVED
    return why


def _first_host(endpoint: str) -> SplitResult:
    """Return the URL of an endpoint, or of the proxy that leads to it."""
    url = urlsplit(endpoint)
    proxies = {} if proxy_bypass(url.hostname or "") else getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    return urlsplit(proxy if "//" in proxy else f"//{proxy}") if proxy else url


def _why_no_connection(host: str, port: int) -> str | None:
    try:
        with ThreadPoolExecutor(1) as pool:  # a notebook's thread has an event loop of its own
            pool.submit(asyncio.run, _connect(host, port)).result()
    except OSError as error:
        told = str(error) or f"no answer within {_SECONDS:g} seconds"  # a timeout says nothing
        return f"no connection to {host}: {told}"
    return None


async def _connect(host: str, port: int) -> None:
    """Connect to the first of the host's addresses that answers."""
    async with asyncio.timeout(_SECONDS):
        _, writer = await asyncio.open_connection(host, port, happy_eyeballs_delay=0.1)
    writer.close()


@contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """Let the hub's libraries look only into their caches if the hub cannot be reached."""
    if why_unreachable() is None:
        yield
        return
    readers: list[Any] = [constants, sys.modules.get("datasets.config")]
    before = [(one, one.HF_HUB_OFFLINE) for one in readers if one is not None]
    try:
        for one, _ in before:
            one.HF_HUB_OFFLINE = True
        yield
    finally:
        for one, value in before:
            one.HF_HUB_OFFLINE = value
