"""GGUF weights, dequantised once and kept as safetensors.

transformers reads GGUF itself, but takes ten seconds or more for a 135M model at every start.
"""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils.hub import cached_file

from lit_ft.storage.cache_dir import user_cache


def as_safetensors(name_or_path: str, gguf_file: str, *, revision: str | None = None) -> Path:
    """Return a folder with the dequantised float32 model and tokenizer; make it if it is missing.

    The folder is named after the GGUF file's content and transformers' version. It is complete or
    absent, so several processes may make it at once.

    Args:
        name_or_path: A hub id or a local folder.
        gguf_file: The name of the GGUF file there.
        revision: The branch, tag or commit on the hub.
    """
    file = cached_file(name_or_path, gguf_file, revision=revision)
    assert file is not None  # it is None only with options that are not used here
    source = Path(file).resolve()
    folder = (
        user_cache()
        / "models"
        / f"{source.stem}-{_digest(source)[:16]}-transformers{transformers.__version__}"
    )
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _dequantise(source, building)
        os.replace(building, folder)
    except OSError:
        # Another process was faster: a folder that is not empty is never replaced.
        if not (folder / "config.json").is_file():
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _dequantise(source: Path, folder: Path) -> None:
    quantised = AutoModelForCausalLM.from_pretrained(
        str(source.parent),
        gguf_file=source.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    config = copy.deepcopy(quantised.config)
    vars(config).pop("quantization_config", None)  # save_pretrained refuses a model from GGUF
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.load_state_dict(quantised.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = quantised.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name).save_pretrained(folder)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
