"""A tiny CausalLMModule, batches for it, and a trainer that prints nothing."""

from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader

from lit_ft import CausalLMModule
from lit_ft.loss.targets import IGNORE_INDEX
from lit_ft.models import FromConfig

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def module_of(model_type="llama", **options):
    # Linear in the gradient: AdamW would blow round-off up where gradients are near zero.
    options.setdefault("optimizer", partial(torch.optim.SGD, lr=0.1))
    torch.manual_seed(0)
    return CausalLMModule(FromConfig(model_type, TINY), **options)


def quiet_trainer(**options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )


def trainer_of(folder, **options):
    defaults = {"devices": 1, "max_steps": 2, "logger": False, "enable_checkpointing": False}
    return Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{**defaults, **options},
    )


def batch_of(lengths, seed=0, width=12):
    """Right-padded rows whose first two tokens are no targets."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 64, (len(lengths), width), generator=generator)
    mask = (torch.arange(width)[None] < torch.tensor(lengths)[:, None]).long()
    labels = ids.masked_fill((mask == 0) | (torch.arange(width) < 2), IGNORE_INDEX)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def float16(scale):
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", scale))


def rows(batch, start, stop):
    return {key: value[start:stop] for key, value in batch.items()}


def inputs_of(batch):
    return {key: value for key, value in batch.items() if key != "labels"}


def loader(*batches):
    return DataLoader(batches, batch_size=None)


def weights_after(tmp_path, batches, **options):
    trainer_options = {"max_steps": 2, "gradient_clip_val": 0.5}
    module_options = {}
    for key, value in options.items():
        (module_options if key in ("schedule", "adapter") else trainer_options)[key] = value
    module = module_of(**module_options)
    trainer_of(tmp_path, **trainer_options).fit(module, loader(*batches))
    return dict(module.model.named_parameters())
