"""The cells of one_gpu.py: a name is a sentence of words, and a word means settings."""

from __future__ import annotations

import os
from typing import Any

from omegaconf import OmegaConf

from lit_ft.run.arguments import CONF
from lit_ft.run.hidden import in_grammar
from support.memory_cells import text_rows

_MODELS = ("llama_3_2_1b", "llama_3_2_3b", "llama_3_1_8b", "qwen3_1_7b", "qwen3_4b")
_OPTIMS = ("adamw_8bit", "adafactor_fixed", "galore_subspace", "galore_subspace_8bit")
_COMMON = [
    "data.overlong=cut",
    "data.group_by_length=false",  # so that batches hold rows of both lengths
    "data.max_val_examples=4",
    # A run goes on until its own plan is there, and ends with a log, which waits for the GPU.
    "trainer.max_steps=20",
    "trainer.gradient_clip_val=null",
    "callbacks=none",
    "+callbacks.throughput._target_=lit_ft.callbacks.ThroughputMonitor",
    "logger=none",
]
_TINY = {
    "vocab_size": 49152,  # the tokenizer's
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
_WORDS = {
    **{name: [f"optim={name}"] for name in _OPTIMS},
    "lora": ["adapter=lora"],
    "whole": ["update=whole"],
    "layerwise": ["update=layerwise"],
    "checkpointing": ["module.activation_checkpointing=true"],
    "clipping": ["trainer.gradient_clip_val=1.0"],
    **{f"batch{size}": [f"data.batch_size={size}"] for size in (1, 2, 4)},
}
_RECIPE = "llama_3_1_8b galore_subspace_8bit layerwise checkpointing"
GROUPS = {
    "memory": (  # what a plan has to foresee
        "llama_3_1_8b galore_subspace_8bit whole checkpointing batch1",
        "llama_3_1_8b adamw_8bit layerwise checkpointing batch1",
        "llama_3_1_8b lora whole checkpointing batch1",
        "llama_3_1_8b adafactor_fixed layerwise checkpointing batch2",
        "qwen3_4b galore_subspace layerwise batch1",
        "qwen3_4b adamw_8bit whole checkpointing clipping batch1",
        "llama_3_2_3b galore_subspace whole checkpointing batch2",
        "qwen3_1_7b lora whole batch1",
        "llama_3_2_1b adafactor_fixed whole batch1",
        "llama_3_2_1b galore_subspace_8bit layerwise batch4",
    ),
    "speed": (  # the recipe for a small card; these run alone
        f"{_RECIPE} batch1",
        f"{_RECIPE} batch2",
        f"{_RECIPE} clipping batch1",
        f"{_RECIPE} clipping batch2",
    ),
}


def settings_of(cell: str, *, device: str = "cuda", tiny: bool = False) -> list[str]:
    """Return the arguments of `train.py` for a cell, without its data.

    Args:
        cell: The name of the cell.
        device: The device to train on, "cuda" or "cpu".
        tiny: Whether to shrink the model, the rows and the subspaces, to try the cell out.
    """
    model, *words = cell.split()
    strategy = "single_gpu" if device == "cuda" else "cpu"
    settings = [*_random_weights(model), f"data.max_length={_length(tiny)}", *_COMMON]
    settings += [f"strategy={strategy}"]
    settings += [setting for word in words for setting in _WORDS[word]]
    if tiny:
        settings += [f"model.config.{name}={value}" for name, value in _TINY.items()]
        settings += ["trainer.max_steps=5"]
        settings += ["galore.rank=8"] * any(word.startswith("galore") for word in words)
    return settings


def rows(*, tiny: bool = False) -> list[dict[str, str]]:
    """Return texts of the length of a cell's rows, a third of them a token shorter."""
    return text_rows([_length(tiny), _length(tiny) - 1])


def _length(tiny: bool) -> int:
    return 64 if tiny else 2048


def _random_weights(model: str) -> list[str]:
    """Return the settings of a model with random weights in the published shape."""
    published: Any = OmegaConf.to_container(OmegaConf.load(CONF / "model" / f"{model}.yaml"))
    config = published["config"]
    found = ["model=tiny", f"model.name={model}", f"model.model_type={config.pop('model_type')}"]
    found += [f"++model.config.{name}={in_grammar(value)}" for name, value in config.items()]
    return [*found, *packed_tokenizer()]


def packed_tokenizer() -> list[str]:
    """Return the setting that takes the tokenizer which on_gpu.sh has brought along, if it has."""
    folder = os.environ.get("LIT_FT_TOKENIZER")
    return [f"model.tokenizer={folder}"] if folder else []
