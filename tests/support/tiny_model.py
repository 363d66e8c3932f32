"""A small random model of any architecture that transformers knows."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config


def tiny_model(model_type: str, **config):
    """Build a model of two layers; `config` adds settings of the architecture, or changes sizes."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = AutoConfig.for_model(model_type, **{**sizes, **config}, pad_token_id=0, eos_token_id=2)
    return AutoModelForCausalLM.from_config(config)


def two_towers():
    """Build a language model with a tower for images, as `AutoModelForCausalLM` builds Gemma 3."""
    torch.manual_seed(0)
    text = {"vocab_size": 64, "num_key_value_heads": 1, "head_dim": 8}
    vision = {"image_size": 28, "patch_size": 14}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    sizes["num_attention_heads"] = 2
    config = Gemma3Config(text_config={**sizes, **text}, vision_config={**sizes, **vision})
    return AutoModelForCausalLM.from_config(config)
