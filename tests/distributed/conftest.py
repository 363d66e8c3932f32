"""Models that several of these files train."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.sharded_training import save_llama


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small models as from_pretrained finds them: with tied weights and without."""
    parent = tmp_path_factory.mktemp("models")
    for tied in (True, False):
        save_llama(parent / f"tied_{tied}", tie_word_embeddings=tied)
    return parent
