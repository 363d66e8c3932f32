"""Tokenised data on disk, under a key made from everything that determines it."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerFast

from lit_ft.data.encoding import Encoder
from lit_ft.data.formats import Format
from lit_ft.data.sources import Source
from lit_ft.storage.building import building
from lit_ft.storage.cache_dir import user_cache, written_to_cache
from lit_ft.storage.damage import CHECKSUMS, damage, write_checksums

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return the folder of the tables in the user's cache."""
    return user_cache() / "data"


def cache_key(source: Source, format: Format | None, encoder: Encoder) -> str:
    """Return a hash of everything that determines the encoded rows.

    The hash covers the content of the source, the format, the tokenizer, the settings of the
    encoder, the code of `lit_ft.data`, and the versions of transformers, tokenizers and datasets.
    It does not cover the split into training and validation, because that is made later.
    """
    ingredients = {
        "source": source.identity(),
        "format": None if format is None else _describe(format),
        "tokenizer": _tokenizer_digest(encoder.tokenizer),
        "settings": encoder.settings,
        "code": _code_digest(),
        "versions": {name: version(name) for name in ("transformers", "tokenizers", "datasets")},
    }
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


def cached(key: str, build: Callable[[Path], Dataset]) -> Dataset:
    """Return the table under a key, and build it first if it is missing or damaged.

    An entry of the cache is either complete or absent, so several processes may build it at once.
    The table of the first one to finish is kept.

    Args:
        key: The name of the entry, from `cache_key`.
        build: The function that builds the table. It receives the path of a folder for temporary
            files, which is deleted afterwards.

    Raises:
        OSError: If the cache folder cannot be written to.
        RuntimeError: If the entry is still damaged after three attempts.
    """
    entry = cache_folder() / key
    for _ in range(3):  # another process that found the entry damaged may remove ours once
        if not entry.exists():
            with written_to_cache():
                _write(entry, build)
        try:
            return _load(entry)
        except Exception as error:  # a damaged file can make its reader raise anything
            logger.warning("rebuilding the damaged cache entry %s: %s", entry, error)
            _discard(entry)
    raise RuntimeError(
        f"{entry} does not hold what was written to it: check whether the disk is full or failing."
    )


def _write(entry: Path, build: Callable[[Path], Dataset]) -> None:
    with building(entry.parent) as work:
        finished = work / "entry"
        build(work / "scratch").save_to_disk(finished)
        write_checksums(finished)
        try:
            os.replace(finished, entry)
        except OSError:
            # Another process may have put the same table there in the meantime.
            if not entry.exists():
                raise


def _load(entry: Path) -> Dataset:
    from datasets import load_from_disk

    if not (entry / CHECKSUMS).is_file():
        raise ValueError(f"it has no {CHECKSUMS}")
    # Extra files come from `filter` and `map`, which write next to the table that they read.
    if (reason := damage(entry)) is not None:
        raise ValueError(reason)
    return load_from_disk(entry)


def _discard(entry: Path) -> None:
    # Renaming removes the entry in one step; a process that loses the race finds nothing.
    with building(entry.parent) as grave, suppress(FileNotFoundError):
        os.replace(entry, grave / "damaged")


def _describe(choice: object) -> list[object]:
    """Describe an object by its class, its arguments and the code of its module."""
    arguments = asdict(choice) if is_dataclass(choice) else vars(choice)  # type: ignore[arg-type]
    code = Path(inspect.getfile(type(choice))).read_bytes()
    return [type(choice).__qualname__, repr(arguments), hashlib.sha256(code).hexdigest()]


def _tokenizer_digest(tokenizer: Any) -> str:
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    parts = [
        tokenizer.backend_tokenizer.to_str(),
        json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str),
        json.dumps(tokenizer.chat_template),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@cache
def _code_digest() -> str:
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
