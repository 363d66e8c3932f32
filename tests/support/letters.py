"""A module that knows nothing of lit_ft: a tiny Llama that reads and writes letters."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def letters_tokenizer(chat_template: str | None = CHAT) -> PreTrainedTokenizerFast:
    """One token a letter, `</s>` at the end, and no padding token."""
    vocabulary = {"</s>": 0, **{letter: i + 1 for i, letter in enumerate(LETTERS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="z"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    # As many tokenizers do, with what a chat template writes itself.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    fast.chat_template = chat_template
    return fast


class Plain(LightningModule):
    """Trains with dropout and activation checkpointing, which both could leave traces."""

    def __init__(self, tokenizer=None) -> None:
        super().__init__()
        torch.manual_seed(1)
        config = LlamaConfig(
            vocab_size=27,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            attention_dropout=0.3,
            initializer_range=0.7,  # so that what it writes depends on what it reads
            eos_token_id=0,
            bos_token_id=None,
        )
        self.model = LlamaForCausalLM(config)
        self.model.activation_checkpointing_enable()
        self.model.model.layers[0].mlp.eval()  # somebody's choice, to be kept
        self.tokenizer = tokenizer or letters_tokenizer()
        self.losses: list[float] = []

    def training_step(self, batch, batch_idx):
        loss = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train_dataloader(self):
        return DataLoader(torch.arange(64).view(8, 8) % 27, batch_size=2, shuffle=True)
