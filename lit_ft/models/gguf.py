"""Dequantise GGUF weights once, and keep them as safetensors.

transformers can read GGUF itself, but for a 135M model that takes ten seconds or more at every
start.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import shutil
from functools import cache
from pathlib import Path

import torch
import transformers
from transformers.utils.hub import cached_file

from lit_ft.storage.building import building
from lit_ft.storage.cache_dir import user_cache, written_to_cache
from lit_ft.storage.damage import damage, write_checksums
from lit_ft.storage.write_errors import write_errors_name
from lit_ft.terminal import stage

logger = logging.getLogger(__name__)


def as_safetensors(name_or_path: str, gguf_file: str, *, revision: str | None = None) -> Path:
    """Return a folder with the dequantised float32 model and tokenizer; make it if it is missing.

    The folder's name contains a hash of the GGUF file's content and the version of transformers.
    Several processes may call this at once, because the folder appears only when it is complete.

    Args:
        name_or_path: The hub id or the local folder that has the GGUF file.
        gguf_file: The name of the GGUF file.
        revision: The branch, tag or commit on the hub; None for the default branch.
    """
    file = cached_file(name_or_path, gguf_file, revision=revision)
    assert file is not None  # it is None only with options that are not used here
    source = Path(file).resolve()
    digest = _digest(source, _stamps(source))[:16]
    name = f"{source.stem}-{digest}-transformers{transformers.__version__}"
    folder = user_cache() / "models" / name
    if (folder / "config.json").is_file():
        if (reason := _damage(folder, _stamps(*folder.iterdir()))) is None:
            return folder
        logger.warning("making the damaged %s again: %s", folder, reason)
        shutil.rmtree(folder, ignore_errors=True)
    with written_to_cache(), write_errors_name(folder), building(folder.parent) as work:
        finished = work / "model"
        finished.mkdir()
        with stage("converting the GGUF file, once for all runs"):
            _dequantise(source, finished)
            write_checksums(finished)
        try:
            os.replace(finished, folder)
        except OSError:
            # Another process was faster: os.replace fails if the folder exists and is not empty.
            if not (folder / "config.json").is_file():
                raise
    return folder


def _dequantise(source: Path, folder: Path) -> None:
    quantised = transformers.AutoModelForCausalLM.from_pretrained(
        str(source.parent),
        gguf_file=source.name,
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
        trust_remote_code=False,  # otherwise transformers asks on the terminal
    )
    config = copy.deepcopy(quantised.config)
    vars(config).pop("quantization_config", None)  # save_pretrained refuses a model from GGUF
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.load_state_dict(quantised.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = quantised.generation_config
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(
        str(source.parent), gguf_file=source.name, trust_remote_code=False
    ).save_pretrained(folder)


def _stamps(*files: Path) -> tuple[tuple[str, int, int], ...]:
    """Return the name, size and time of each file, which change when it is written to."""
    found = [(file.name, file.stat()) for file in sorted(files)]
    return tuple((name, about.st_size, about.st_mtime_ns) for name, about in found)


# A run asks for the model's folder several times, and its files are large: each is read once.
@cache
def _damage(folder: Path, stamps: tuple[tuple[str, int, int], ...]) -> str | None:
    return damage(folder)


@cache
def _digest(file: Path, stamps: tuple[tuple[str, int, int], ...]) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
