"""A model as from_pretrained finds it."""

import pytest

from tests.support.tiny_model import tiny_model


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    return tmp_path / "base"
