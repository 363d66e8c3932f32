"""Adapters on tied layers."""

import pytest
from peft import LoraConfig

from lit_ft.models import add_adapter
from tests.support.tiny_model import tiny_model


@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
def test_an_adapter_on_one_of_two_tied_layers_is_refused(layer):
    """Merged, it would change the other one as well."""
    config = LoraConfig(target_modules=["q_proj", layer])
    with pytest.raises(ValueError, match=rf"{layer} is tied to another layer.*target_modules"):
        add_adapter(tiny_model("llama", tie_word_embeddings=True), config)
    add_adapter(tiny_model("llama", tie_word_embeddings=False), config)
