"""Runs that stop at each of their steps and resume: on one rank, or the same code on several."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import transformers
from lightning.pytorch import Callback
from torch import Tensor

from lit_ft import CausalLMModule, InstructionDataModule
from lit_ft.callbacks import AtomicCheckpointIO, LastCheckpoint, StopOnSignal
from lit_ft.models import FromConfig
from lit_ft.optim import WarmupSchedule
from tests.support.stopping import Fault, StopAt
from tests.support.tiny_module import TINY, trainer_of
from tests.support.tokenizer import byte_level_tokenizer

MODEL = {**TINY, "vocab_size": 320, "hidden_size": 16, "attention_dropout": 0.1}

SCHEDULES = {
    "cosine": partial(transformers.get_cosine_with_min_lr_schedule_with_warmup, min_lr_rate=0.1),
    "constant": transformers.get_constant_schedule_with_warmup,
    "linear": transformers.get_linear_schedule_with_warmup,
}

# An epoch of thirteen rows is four steps of four rows, the last one short.
LENGTHS: dict[str, dict[str, int]] = {
    "max_steps": {"max_steps": 8},
    "max_epochs": {"max_steps": -1, "max_epochs": 2},
    "both": {"max_steps": 7, "max_epochs": 2},
}

Rows = list[tuple[int, list[Any]]]  # of each micro-batch: the steps before it, and its tokens


class Seen(Callback):
    """Keeps the rows that this rank trains on."""

    def __init__(self) -> None:
        self.rows: Rows = []

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self.rows.append((trainer.global_step, batch["input_ids"].tolist()))


def write_rows(folder: Path) -> Path:
    """Write thirteen rows that differ, and one to validate on."""
    for name, numbers in (("rows", range(13)), ("val", [13])):
        rows = [{"prompt": f"{n}?", "completion": "x " * (n % 5) + str(n)} for n in numbers]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def fit(
    folder: Path,
    path: Path,
    *,
    schedule: str,
    length: str,
    stop: int | None = None,
    by: str = "signal",
    streaming: bool = False,
) -> tuple[Rows, dict[str, Tensor], int]:
    """Train, or go on with what `folder` holds; return this rank's rows, the weights and the steps.

    Ctrl-C comes on the first rank while the step after `stop` others is under way; or, with
    `by="callback"`, a callback ends the training after that step.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    module = CausalLMModule(
        FromConfig("llama", MODEL),
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
        schedule=WarmupSchedule(SCHEDULES[schedule], warmup=0.2),
    )
    data = InstructionDataModule(
        str(path),
        val_path=str(path.with_name("val.jsonl")),
        tokenizer=byte_level_tokenizer(),
        batch_size=2 // world,
        streaming=streaming,
    )
    seen = Seen()
    callbacks = [seen, LastCheckpoint(folder), StopOnSignal()]
    if stop is not None and rank == 0:
        fault = Fault("on_train_batch_start", stop, "interrupt")
        callbacks.insert(0, fault if by == "signal" else StopAt(stop + 1))
    trainer = trainer_of(
        folder,
        strategy="ddp" if world > 1 else "auto",
        devices=world,
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        limit_val_batches=0,
        use_distributed_sampler=False,
        enable_checkpointing=True,
        plugins=[AtomicCheckpointIO()],
        callbacks=callbacks,
        **LENGTHS[length],
    )
    last = folder / "last.ckpt"
    resumed = last if last.exists() else None
    if world > 1:
        dist.barrier()  # a rank that looks later must not find what another has saved by then
    with suppress(SystemExit):  # Lightning's end of a run that Ctrl-C stops
        trainer.fit(module, data, ckpt_path=resumed)
    return (
        seen.rows,
        {n: p.detach().clone() for n, p in module.named_parameters()},
        trainer.global_step,
    )


def stops_that_differ(folder: Path, path: Path, **options: Any) -> dict[str, Any]:
    """Stop at each step of a run and resume; return what tells whether that made a difference.

    Returns:
        `steps`: of the uninterrupted run; `stops`: the steps at which it was stopped; `differing`:
        those after which the rows or the weights were others; `rows`: the micro-batches of this
        rank; `sum`: of its weights at the end.
    """
    with patch.dict(os.environ, {"LIT_FT_CACHE": str(path.parent / "cache")}):
        rows, weights, steps = fit(folder / "whole", path, **options)
        found = [
            (stop, *_in_two_parts(folder / str(stop), path, stop, **options))
            for stop in range(1, steps)
        ]
    differing = [
        stop
        for stop, rows_of_parts, weights_of_parts in found
        if rows_of_parts != rows or any(_differing(weights, weights_of_parts))
    ]
    return {
        "steps": steps,
        "stops": [stop for stop, *_ in found],
        "differing": differing,
        "rows": [batch for _, batch in rows],
        "sum": sum(float(weight.double().sum()) for weight in weights.values()),
    }


def _in_two_parts(
    folder: Path, path: Path, stop: int, **options: Any
) -> tuple[Rows, dict[str, Tensor]]:
    before, _, steps = fit(folder, path, stop=stop - 1, **options)
    assert steps == stop
    after, weights, _ = fit(folder, path, **options)
    return before + after, weights


def _differing(weights: dict[str, Tensor], others: dict[str, Tensor]) -> Iterator[str]:
    yield from (name for name, weight in weights.items() if not torch.equal(weight, others[name]))
