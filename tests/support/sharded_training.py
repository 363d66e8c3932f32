"""Trains one small Llama in one process or on FSDP2 ranks, with the same global batches."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback
from torch import distributed as dist
from torch.optim import SGD, AdamW
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from lit_ft import CausalLMModule
from lit_ft.callbacks import (
    AtomicCheckpointIO,
    BlockUpdate,
    ExportHF,
    GaLore,
    LastCheckpoint,
    LayerwiseUpdate,
    MemoryMonitor,
)
from lit_ft.distributed import FSDP2Strategy
from lit_ft.models import Pretrained
from lit_ft.optim import RowwiseAdamW8bit
from lit_ft.optim.adafactor import Adafactor, RelativeStepAdafactor
from lit_ft.subspace.projectors import Oja, SubspaceIteration
from lit_ft.tensors.sharding import full_tensor
from tests.support.allocations import watched
from tests.support.joining import joined
from tests.support.tiny_module import batch_of, rows, trainer_of

STEPS = 10

LLAMA = {
    "vocab_size": 301,
    "hidden_size": 24,
    "intermediate_size": 37,  # odd: two ranks do not hold as many rows
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

LARGER = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "vocab_size": 8000,
    "num_hidden_layers": 8,
}


def save_llama(folder, **sizes):
    """Write a small random Llama, as LLAMA and `sizes` say, where from_pretrained finds it."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **{**LLAMA, **sizes})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


OPTIMIZERS = {
    "adamw": partial(AdamW, lr=1e-3),
    "adamw_fused": partial(AdamW, lr=1e-3, fused=True),
    "sgd": partial(SGD, lr=1e-2, momentum=0.9),
    "adafactor": partial(RelativeStepAdafactor, relative_size=0.1),
    "adafactor_fixed": partial(
        Adafactor, lr=1e-3, beta1=0.9, relative_step=False, scale_parameter=False
    ),
    "adamw_8bit": partial(RowwiseAdamW8bit, lr=1e-3),
}

PROJECTORS = {"oja": Oja(every=2), "iteration": SubspaceIteration(every=4)}


class Freed(Callback):
    """Sees to it that backward leaves no gradient, but those of subspaces."""

    def on_after_backward(self, trainer, pl_module):
        kept = [n for n, p in pl_module.named_parameters() if p.grad is not None]
        assert all(name.endswith(".delta") for name in kept), kept


def batches(accumulate, rank, size):
    """Each rank's rows of the same global batches: 8 rows, of several lengths."""
    made = [batch_of([12, 3, 9, 4, 12, 2, 5, 7], seed=seed) for seed in range(STEPS)]
    share = 8 // accumulate // size
    starts = [(micro * size + rank) * share for micro in range(accumulate)]
    return [rows(batch, start, start + share) for batch in made for start in starts]


def train(
    model_folder,
    run_dir,
    *,
    sharded,
    optimizer="adamw",
    projector=None,
    accumulate=1,
    clip=None,
    steps=STEPS,
    resume=None,
    export=None,
    layerwise=False,
    blocks=None,
    precision="32-true",
    cpu_offload=False,
    parts=True,
    replicas=1,
    tracked_steps=0,
    **options,
):
    """Train on one process or on all ranks; return the whole weights and what the ranks held."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if sharded else (0, 1)
    callbacks = [LastCheckpoint(Path(run_dir) / "checkpoints", every_n_steps=100)]
    monitor = MemoryMonitor(tracked_steps=tracked_steps)
    callbacks.append(monitor)
    if projector is not None:
        callbacks.append(GaLore(rank=4, projector=PROJECTORS[projector]))
    if layerwise:
        callbacks += [LayerwiseUpdate(min_grad_bytes=0), *[Freed()] * (accumulate == 1)]
    if blocks is not None:
        callbacks.append(BlockUpdate(**blocks))
    if export is not None:
        callbacks.append(ExportHF(run_dir / "export", dtype=export))
    module = CausalLMModule(
        Pretrained(str(model_folder), dtype="float64" if precision == "32-true" else None),
        optimizer=OPTIMIZERS[optimizer],
        **options,
    )
    vars(module)["tokenizer"] = None  # the folder has none
    strategy = FSDP2Strategy(
        data_parallel_replicate_size=replicas,
        cpu_offload=cpu_offload,
        save_distributed_checkpoint=parts,
    )
    fsdp = {"strategy": strategy, "devices": size}
    trainer = trainer_of(
        run_dir,
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        callbacks=callbacks,
        enable_checkpointing=True,
        precision=precision,
        use_distributed_sampler=False,
        plugins=[AtomicCheckpointIO()],
        **(fsdp if sharded else {}),
    )
    data = StatefulDataLoader(batches(accumulate, rank, size), batch_size=None)
    trainer.validate(module, data, verbose=False)
    trainer.fit(module, data, ckpt_path=resume)
    held = {n: type(p).__name__ for n, p in module.named_parameters()}
    weights = {n: full_tensor(p.detach()).clone() for n, p in module.model.state_dict().items()}
    loss = {name: float(value) for name, value in trainer.callback_metrics.items()}
    loss.pop("peak GiB", None)
    assert bool(monitor.peaks) == bool(tracked_steps)
    return weights, held, loss


def load(model_folder, sharded=True, **options):
    """Build and load the model, move its weights, and return the most bytes that this took."""
    strategy = FSDP2Strategy() if sharded else None
    module = joined(Pretrained(str(model_folder)), strategy=strategy, **options)
    with watched() as most:
        module.configure_model()
        with torch.no_grad():
            for parameter in module.parameters():  # what is mapped becomes the process's own
                parameter.add_(1)
    return most[0]
