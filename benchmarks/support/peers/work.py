"""What all rows share: the model, the batches, the schedule and the held-out loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from hydra.utils import instantiate
from torch.nn.functional import cross_entropy

from lit_ft import InstructionDataModule
from lit_ft.loss.targets import IGNORE_INDEX
from lit_ft.optim import WarmupSchedule
from support.composed import composed
from support.peers.job import Job


class OwnedWeights:
    """A model source whose weights lie in memory of torch's allocator, not in a mapped file.

    Memory of a mapped file would not be counted, and rows would differ in when they copy it.
    """

    def __init__(self, source: Any) -> None:
        self._source = source

    def load_model(self, *arguments: Any, **options: Any) -> Any:
        """Return the model."""
        model = self._source.load_model(*arguments, **options)
        for tensor in chain(model.parameters(), model.buffers()):
            tensor.data = tensor.data.clone()
        return model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


def overrides(job: Job) -> list[str]:
    """Return the arguments of `train.py` that all rows share."""
    random = ["model.seed=0"] if job.model == "tiny" else []  # the same weights for each seed
    return [
        f"model={job.model}",
        *random,
        "strategy=cpu",
        "callbacks=none",
        "logger=none",
        f"seed={job.seed}",
        f"trainer.max_steps={job.steps}",
        f"data.batch_size={job.batch_size}",
        f"data.max_length={job.max_length}",
        f"data.max_val_examples={job.val_examples}",
    ]


def source(job: Job) -> OwnedWeights:
    """Return the source of the model and its tokenizer."""
    return OwnedWeights(instantiate(composed(*overrides(job))["model"], _convert_="all"))


def data_module(job: Job) -> InstructionDataModule:
    """Return the embedded data, encoded and ready."""
    settings = composed(*overrides(job))["data"]
    tokenizer = source(job).load_tokenizer()
    data = instantiate(settings, tokenizer=tokenizer, _convert_="all")
    data.verbose = False
    data.prepare_data()
    data.setup()
    return data


def schedule() -> WarmupSchedule:
    """Return the schedule of `train.py`."""
    return instantiate(composed()["schedule"], _convert_="all")


@torch.no_grad()
def held_out_loss(model: Any, batches: Iterable[Mapping[str, Any]]) -> float:
    """Return the mean cross-entropy of the target tokens, from the logits of the whole batch."""
    model.eval()
    total, targets = 0.0, 0
    for batch in batches:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        logits = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
        labels = batch["labels"][:, 1:].flatten()
        total += float(cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum"))
        targets += int((labels != IGNORE_INDEX).sum())
    return total / targets
