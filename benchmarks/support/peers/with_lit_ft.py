"""Rows of lit_ft, composed as `python train.py` composes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_ft.callbacks import AtomicCheckpointIO, LastCheckpoint
from support.composed import composed, module_and_data
from support.peers.job import Job, Trained
from support.peers.meter import Meter
from support.peers.work import OwnedWeights, overrides, source


class _Metered(Callback):
    """Calls the meter, and ends a run that is to stop."""

    def __init__(self, meter: Meter, stop_after: int | None) -> None:
        self.meter = meter
        self.stop_after = stop_after

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.meter.begins()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.meter.sees(batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.meter.step_ends()
        if trainer.global_step == self.stop_after:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.meter.ends()


@dataclass(frozen=True)
class LitFt:
    """lit_ft with these arguments of `train.py`.

    Args:
        arguments: The arguments, separated by spaces.
    """

    arguments: str

    def train(self, job: Job, meter: Meter) -> Trained:
        """Train, and return the model."""
        chosen = [job.filled(argument) for argument in self.arguments.split()]
        config = composed(*overrides(job), *chosen, f"optim.lr={job.rate}")
        L.seed_everything(job.seed, verbose=False)
        module, data = module_and_data(config)
        module.source = OwnedWeights(module.source)
        callbacks = [instantiate(node, _convert_="all") for node in config["callbacks"].values()]
        callbacks.append(_Metered(meter, job.stop_after))
        if job.stop_after is not None:
            callbacks.append(LastCheckpoint(job.folder, every_n_steps=job.stop_after))
        trainer = Trainer(
            accelerator="cpu",
            max_steps=job.steps,
            gradient_clip_val=config["trainer"]["gradient_clip_val"],
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO()],
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=job.stop_after is not None,
            enable_model_summary=False,
            enable_progress_bar=False,
            limit_val_batches=0,
        )
        trainer.fit(module, data, ckpt_path=f"{job.folder}/last.ckpt" if job.resumes else None)
        [optimizer] = trainer.optimizers
        return Trained(module.model, optimizer.param_groups[0]["lr"])


class Untrained:
    """The model as it is before training."""

    def train(self, job: Job, meter: Meter) -> Trained:
        """Return the model."""
        return Trained(source(job).load_model(torch.float32))
