"""The cells of memory_plan.py: a name is a sentence of words, and a word means settings."""

from __future__ import annotations

from collections.abc import Sequence

_COMMON = [
    "model=tiny",
    "data.overlong=cut",
    "data.chat_template=plain",  # in tokens that the small vocabularies have
    "data.group_by_length=false",  # so that batches hold rows of both lengths
    "trainer.max_steps=5",
    "data.max_val_examples=4",
    "+callbacks.samples.max_new_tokens=4",
    "logger=none",
    "plan.check=false",
    "trainer.gradient_clip_val=null",
]
_SINGLE = ["strategy=cpu"]
_GALORE = ["galore.rank=32"]


def _fsdp(ranks: int) -> list[str]:
    return ["strategy=fsdp", "trainer.accelerator=cpu", f"trainer.devices={ranks}"]


def _size(**config: int) -> list[str]:
    return [f"model.config.{name}={value}" for name, value in config.items()]


# Qwen3 and Gemma 3 name the width of a head by itself, and Llama has it from hidden_size.
_LENGTHS = {"small": 128, "large": 192}  # tokens
_SIZES = {
    "small": _size(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=4096,
    )
    + [f"data.max_length={_LENGTHS['small']}"],
    "large": _size(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=7,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=8192,
    )
    + [f"data.max_length={_LENGTHS['large']}"],
}
WORDS = {
    "llama": [],
    "qwen3": ["model.model_type=qwen3", "+model.config.head_dim=32"],
    "gemma3": [
        "model.model_type=gemma3_text",
        "+model.config.head_dim=32",
        "+model.config.query_pre_attn_scalar=32",
        "+model.config.sliding_window=64",
    ],
    **_SIZES,
    **{name: [f"optim={name}"] for name in ("adamw", "adamw_8bit", "adafactor", "muon")},
    "adamw_8bit_torchao": ["optim=adamw_8bit_torchao"],
    "galore": ["optim=galore", *_GALORE],
    "galore_subspace": ["optim=galore_subspace", *_GALORE],
    "galore_subspace_8bit": ["optim=galore_subspace_8bit", *_GALORE],
    "lora": ["adapter=lora"],
    "whole": ["update=whole"],
    # The matrices of a small model are below the default of 1 MiB.
    "layerwise": ["update=layerwise", "callbacks.layerwise.min_grad_bytes=65536"],
    "checkpointing": ["module.activation_checkpointing=true"],
    "accumulation": ["trainer.accumulate_grad_batches=2"],
    "clipping": ["trainer.gradient_clip_val=1.0"],
    "unpadded": [],
    "fsdp1": _fsdp(1),
    "fsdp2": _fsdp(2),
    "fsdp8": _fsdp(8),
}

CELLS = [
    line.strip()
    for line in """
    llama small adamw whole
    llama small adamw layerwise
    llama small adamw whole checkpointing clipping
    llama small adamw layerwise clipping
    llama small adamw whole accumulation
    llama small adamw layerwise checkpointing accumulation
    llama small adamw_8bit whole clipping
    llama small adafactor layerwise
    llama small muon whole accumulation
    llama small galore whole checkpointing
    llama small galore_subspace layerwise clipping
    llama small galore_subspace_8bit layerwise accumulation
    llama small adamw lora whole
    llama small adamw_8bit lora whole checkpointing clipping
    llama large adamw_8bit layerwise
    llama large adafactor whole clipping
    llama large muon whole checkpointing
    llama large galore layerwise accumulation
    llama large galore_subspace whole
    llama large galore_subspace_8bit whole checkpointing clipping
    llama large adamw lora whole accumulation
    qwen3 small adamw_8bit layerwise checkpointing
    qwen3 small adafactor whole accumulation
    qwen3 small muon whole clipping
    qwen3 small galore layerwise
    qwen3 small galore_subspace whole checkpointing accumulation
    qwen3 small galore_subspace_8bit layerwise
    qwen3 small adafactor lora whole
    qwen3 small muon lora whole clipping
    qwen3 large adamw whole
    qwen3 large adamw layerwise clipping
    qwen3 large adamw_8bit whole accumulation
    qwen3 large adafactor layerwise checkpointing
    qwen3 large galore whole clipping
    qwen3 large galore_subspace layerwise
    qwen3 large galore_subspace_8bit whole
    qwen3 large adamw lora layerwise checkpointing
    gemma3 small adamw whole accumulation clipping
    gemma3 small adamw_8bit whole checkpointing
    gemma3 small adafactor layerwise clipping
    gemma3 small muon whole
    gemma3 small galore whole accumulation
    gemma3 small galore_subspace layerwise checkpointing
    gemma3 small galore_subspace_8bit whole clipping
    gemma3 small adamw lora whole accumulation
    gemma3 large adamw layerwise checkpointing
    gemma3 large adamw_8bit layerwise clipping
    gemma3 large muon whole checkpointing accumulation
    gemma3 large galore layerwise checkpointing
    gemma3 large galore_subspace whole clipping
    gemma3 large galore_subspace_8bit layerwise checkpointing accumulation
    gemma3 large adamw_8bit lora whole
    qwen3 small adamw_8bit_torchao whole
    llama small adamw whole unpadded
    qwen3 large galore_subspace whole unpadded
    gemma3 large adamw whole checkpointing unpadded
    llama small adamw whole fsdp1
    qwen3 small galore_subspace whole clipping fsdp1
    llama small adamw whole fsdp2
    llama large adamw whole checkpointing clipping fsdp2
    qwen3 small adafactor whole fsdp2
    qwen3 large galore_subspace whole fsdp2
    gemma3 small adamw layerwise fsdp2
    llama small adamw lora whole fsdp2
    gemma3 large galore whole accumulation fsdp2
    llama small adamw_8bit_torchao whole fsdp2
    gemma3 small adamw whole fsdp8
    llama small galore_subspace whole fsdp8
    qwen3 small adamw layerwise checkpointing fsdp8
    """.strip().splitlines()
]


def settings_of(cell: str) -> list[str]:
    """Return the arguments of `train.py` for a cell, without its data."""
    words = cell.split()
    where = [] if any(word.startswith("fsdp") for word in words) else _SINGLE
    return [*_COMMON, *where, *(setting for word in words for setting in WORDS[word])]


def rows_of(cell: str) -> list[dict[str, str]]:
    """Return the data of a cell: texts of the words of SmolLM2's tokenizer."""
    words = cell.split()
    [length] = [_LENGTHS[word] for word in words if word in _LENGTHS]
    lengths = [2 * length + 4] * 2 if "unpadded" in words else [length, length - 1]
    return text_rows(lengths)


def text_rows(lengths: Sequence[int]) -> list[dict[str, str]]:
    """Return 200 texts, two thirds of the first length and a third of the second, in tokens."""
    # Three digits and the end of a text are four tokens. Of four rows one or two are of the second
    # length, so that not every micro-batch has rows of one length.
    return [{"text": f"{n:03}" + " the" * (lengths[n % 3 == 2] - 4)} for n in range(200)]
