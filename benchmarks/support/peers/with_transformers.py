"""Rows of transformers' Trainer, of peft with it, and of TRL's SFTTrainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from support.in_order import examples_in_order
from support.peers.job import Job, Trained
from support.peers.meter import Meter
from support.peers.work import data_module, schedule, source


class _OurSchedule:
    """Gives a Trainer the learning rates of lit_ft's schedule."""

    optimizer: Any
    lr_scheduler: Any

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the scheduler, as Trainer's own method does."""
        if self.lr_scheduler is None:
            self.lr_scheduler = schedule()(optimizer or self.optimizer, num_training_steps)
            self._created_lr_scheduler = True
        return self.lr_scheduler


class _Trainer(_OurSchedule, transformers.Trainer):
    pass


class _Metered(transformers.TrainerCallback):
    """Calls the meter, and ends a run that is to stop."""

    def __init__(self, meter: Meter, stop_after: int | None) -> None:
        self.meter = meter
        self.stop_after = stop_after

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.meter.begins()

    def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> None:
        self.meter.step_ends()
        if state.global_step == self.stop_after:
            control.should_training_stop = True  # what save_steps has asked for is saved first

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.meter.ends()


def _arguments(job: Job) -> dict[str, Any]:
    """Return the arguments that all rows share; batches come in their order."""
    return {
        "output_dir": job.folder,
        "use_cpu": True,
        "bf16": False,  # TRL's own default is True
        "gradient_checkpointing": False,  # the same
        "max_steps": job.steps,
        "per_device_train_batch_size": job.batch_size,
        "train_sampling_strategy": "sequential",
        "learning_rate": job.rate,
        "max_grad_norm": 1.0,
        "weight_decay": 0.01,
        "logging_strategy": "no",
        "save_strategy": "no" if job.stop_after is None else "steps",
        "save_steps": job.stop_after or job.steps,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": job.seed,
    }


@dataclass(frozen=True)
class Transformers:
    """transformers' Trainer with one of its optimizers.

    Args:
        optim: The optimizer's name.
        options: More arguments of TrainingArguments.
    """

    optim: str = "adamw_torch"
    options: Mapping[str, Any] = field(default_factory=dict)

    def train(self, job: Job, meter: Meter) -> Trained:
        """Train, and return the model."""
        options = {name: _filled(job, value) for name, value in self.options.items()}
        arguments = _arguments(job) | {"optim": self.optim} | options
        trainer = _Trainer(
            model=self.model(job),
            args=transformers.TrainingArguments(**arguments),
            train_dataset=examples_in_order(data_module(job), job.steps),
            data_collator=transformers.DataCollatorForSeq2Seq(source(job).load_tokenizer()),
        )
        return _run(trainer, job, meter)

    def model(self, job: Job) -> Any:
        """Return the model to train."""
        return source(job).load_model(torch.float32)


@dataclass(frozen=True)
class PeftLora(Transformers):
    """The same with peft's LoRA, in the size of `adapter=lora`."""

    def model(self, job: Job) -> Any:
        """Return the model with the adapter."""
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(job.seed)
        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(super().model(job), config)


@dataclass(frozen=True)
class Sft:
    """TRL's SFTTrainer with its own optimizer, loss and collator."""

    def train(self, job: Job, meter: Meter) -> Trained:
        """Train, and return the model."""
        from trl import SFTConfig, SFTTrainer

        class _Sft(_OurSchedule, SFTTrainer):
            pass

        trainer = _Sft(
            model=source(job).load_model(torch.float32),
            args=SFTConfig(
                **_arguments(job),
                max_length=None,  # no example is too long
                dataset_kwargs={"skip_prepare_dataset": True},
            ),
            train_dataset=examples_in_order(data_module(job), job.steps),
            processing_class=source(job).load_tokenizer(),
        )
        return _run(trainer, job, meter)


def _run(trainer: Any, job: Job, meter: Meter) -> Trained:
    """Train, from the checkpoint if the job resumes."""
    trainer.data_collator = meter.watching(trainer.data_collator)
    trainer.add_callback(_Metered(meter, job.stop_after))
    trainer.remove_callback(transformers.PrinterCallback)
    [checkpoint] = Path(job.folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if job.resumes else [None]
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return Trained(trainer.model, _rate(trainer.optimizer))


def _rate(optimizer: Any) -> float:
    """Return the rate of the weights: of a layerwise optimizer, that of the first one inside."""
    inner = getattr(optimizer, "optimizer", optimizer)
    of_weights = next(iter(getattr(inner, "optimizer_dict", {}).values()), inner)
    return float(of_weights.param_groups[0]["lr"])


def _filled(job: Job, value: Any) -> Any:
    return job.filled(value) if isinstance(value, str) else value
