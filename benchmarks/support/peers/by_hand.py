"""A row of galore-torch in a loop of one's own, as its README shows."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from galore_torch import GaLoreAdamW
from torch import nn
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq

from support.in_order import examples_in_order
from support.peers.job import SETTINGS, Job, Trained
from support.peers.meter import Meter
from support.peers.work import data_module, schedule, source

UNSAFE = "resumes with torch.load(weights_only=False) only"


class GaLoreByHand:
    """GaLoreAdamW on the matrices of attention and MLP, with a loop around it."""

    def train(self, job: Job, meter: Meter) -> Trained:
        """Train, and return the model."""
        model = source(job).load_model(torch.float32).train()
        optimizer = _optimizer(model, job)
        scheduler = schedule()(optimizer, job.steps)
        parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        checkpoint = Path(job.folder) / "checkpoint.pt"
        done, note = _resume(parts, checkpoint) if job.resumes else (0, None)
        batches = _batches(job)
        meter.begins()
        for batch in islice(batches, done, job.stop_after):
            meter.sees(batch)
            model(**batch).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            done += 1
            meter.step_ends()
        meter.ends()
        if job.stop_after is not None:
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save({**state, "done": done}, checkpoint)
        return Trained(model, optimizer.param_groups[0]["lr"], note)


def _optimizer(model: nn.Module, job: Job) -> Any:
    galore = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ("attn" in name or "mlp" in name)
    }
    settings = {"rank": SETTINGS[job.model]["rank"], "update_proj_gap": 200, "scale": 0.25}
    matrices = [p for p in model.parameters() if id(p) in galore]
    others = [p for p in model.parameters() if id(p) not in galore]
    groups = [{"params": others}, {"params": matrices, "proj_type": "std", **settings}]
    return GaLoreAdamW(groups, lr=job.rate, weight_decay=0.01, no_deprecation_warning=True)


def _batches(job: Job) -> DataLoader[Any]:
    rows: Any = examples_in_order(data_module(job), job.steps)
    collator = DataCollatorForSeq2Seq(source(job).load_tokenizer())
    return DataLoader(rows, batch_size=job.batch_size, collate_fn=collator)


def _resume(parts: dict[str, Any], checkpoint: Path) -> tuple[int, str | None]:
    """Load the state of each part; return the number of steps that are done, and a note."""
    note = None
    try:
        saved = torch.load(checkpoint)
    except UnpicklingError:  # the optimizer's state holds objects of a class
        saved = torch.load(checkpoint, weights_only=False)
        note = UNSAFE
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return saved["done"], note
