"""The main job: validate, fine-tune, validate again, and write the results to summary.json."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_ft.callbacks import (
    AutoBatchSize,
    BestCheckpoint,
    ExportHF,
    GaLore,
    LMEval,
    SampleGenerations,
    StartTable,
    StopOnNonFinite,
    StopOnSignal,
)
from lit_ft.callbacks._support.trainer import callbacks_of, find_callback
from lit_ft.compat import remedies
from lit_ft.compat.plan import parallel_of
from lit_ft.compat.refusal import Remedy
from lit_ft.datamodule import InstructionDataModule
from lit_ft.distributed.plan import Misconfiguration, check_run
from lit_ft.measure.environment import TESTED_TORCH, newer_torch
from lit_ft.module import CausalLMModule
from lit_ft.run.failures import (
    errors_of_starting_loaders,
    optimizer_name,
    remedies_for_another_run,
    remedies_for_out_of_memory,
    start_loggers,
)
from lit_ft.run.memory_check import MemoryCheck
from lit_ft.run.model_card import write_cards_of_run
from lit_ft.run.recorder import OpensFolder, Recorder
from lit_ft.run.resume import compare_with_checkpoint
from lit_ft.run.summary import RunSummary
from lit_ft.run.tensorboard import show_end, show_start
from lit_ft.run.trial import callbacks_of_trial

_SAVING = (ModelCheckpoint, ExportHF)


def fine_tune(
    module: CausalLMModule,
    datamodule: InstructionDataModule,
    trainer: Trainer,
    summary: RunSummary,
    *,
    resume: str | Path | None = None,
    validate_only: bool = False,
    facts: Mapping[str, str] | None = None,
    hparams: Mapping[str, Any] | None = None,
    memory: MemoryCheck | None = None,
) -> float:
    """Run the job and return the validation loss at its end.

    Args:
        module: The module to train, whose `configure_model` has not been called yet.
        datamodule: The data module. Validation is limited to as many examples as training reads, so
            that a short trial stays short.
        trainer: The trainer, with any callbacks. They are sorted into the order that lit_ft's
            callbacks need, and lit_ft's fill in their parts of the summary.
        summary: The run summary, already entered as a context manager. Its fields are filled as
            they become known.
        resume: The full-state checkpoint to resume from; None starts from the model's own weights.
        validate_only: Whether to stop after the first validation. It validates the weights of
            `resume` if that is given.
        facts: What `StartTable` and TensorBoard show of the run, keyed by what it is about.
        hparams: What TensorBoard compares the run by, keyed by name.
        memory: The check of the memory plan, which has begun; None for no plan.

    Returns:
        The validation loss at the end.

    Raises:
        Misconfiguration: If the settings do not work together, or the checkpoint's state depends
            on settings that this run does not repeat.
        torch.OutOfMemoryError: If the device has too little memory; the message names settings that
            need less.
    """
    if (version := newer_torch()) is not None:
        rank_zero_warn(
            f"This is torch {version}, and lit_ft is tested on {TESTED_TORCH}. The run continues. "
            "If it fails inside torch, try the tested version."
        )
    if trainer.limit_val_batches == 0:
        raise Misconfiguration(
            "trainer.limit_val_batches=0: a run is judged by its validation",
            Remedy("make it short with max_val_examples=8", {"data.max_val_examples": "8"}),
        )
    if not validate_only and (length := _length_of_no_step(trainer)) is not None:
        raise Misconfiguration(f"{length}: the run would take no step", remedies.VALIDATE_ONLY)
    rows = _rows_per_step(datamodule, trainer)
    datamodule.max_val_examples = _enough_validation(datamodule, trainer, rows)
    recorder = Recorder(summary, optimizer_name(module), None if datamodule.streaming else rows)
    callbacks_of(trainer).extend([OpensFolder(summary), recorder, *callbacks_of_trial()])
    if memory is not None:
        callbacks_of(trainer).append(memory)
    callbacks_of(trainer).sort(key=_turn)
    if not validate_only and not any(isinstance(one, _SAVING) for one in callbacks_of(trainer)):
        rank_zero_warn(
            "This run saves nothing, neither a checkpoint nor an export: it has no callback for it."
        )
    if (table := find_callback(trainer, StartTable)) is not None and not validate_only:
        table.facts |= facts or {}
        datamodule.verbose = False
        if (galore := find_callback(trainer, GaLore)) is not None:
            galore.verbose = False
    if not validate_only:
        check_run(trainer, module)  # `fit` would refuse only after a model is loaded and validated
        if (lm_eval := find_callback(trainer, LMEval)) is not None:
            lm_eval.load()  # for the same reason
    if resume is not None:
        compare_with_checkpoint(resume, recorder, weights_only=validate_only)
    start_loggers(trainer)
    with (
        remedies_for_out_of_memory(module, datamodule, trainer),
        remedies_for_another_run(resume),
        errors_of_starting_loaders(),
    ):
        if resume is None or validate_only:
            [metrics, *_] = trainer.validate(module, datamodule, ckpt_path=resume, verbose=False)
            summary.update(initial_val_loss=metrics["val_loss"])
        if not validate_only:
            show_start(trainer, facts or {})
            trainer.fit(module, datamodule, ckpt_path=resume)
            with _logged_once(trainer, recorder):
                [metrics, *_] = trainer.validate(module, datamodule, verbose=False)
            best = find_callback(trainer, BestCheckpoint)
            if best is not None:
                best.keep_if_best(trainer)
        else:
            summary.update(ended="validation only, nothing was trained")
    prefix = "val_loss/"
    by_source = {k.removeprefix(prefix): v for k, v in metrics.items() if k.startswith(prefix)}
    summary.update(
        val_loss=metrics["val_loss"],
        val_perplexity=metrics["val_perplexity"],
        val_loss_by_source=by_source or None,
    )
    if not validate_only:
        write_cards_of_run(trainer, module, summary.fields)
        summary.note_disk()
        results = ("val_loss", "val_perplexity", "train_loss", "tokens_per_second")
        show_end(trainer, hparams or {}, {name: summary.fields[name] for name in results})
    if (samples := find_callback(trainer, SampleGenerations)) is not None:
        summary.samples = samples.generations
    return metrics["val_loss"]


@contextmanager
def _logged_once(trainer: Trainer, recorder: Recorder) -> Iterator[None]:
    """Keep a validation from the loggers if `fit` has validated and logged the same weights."""
    loggers = trainer.loggers
    if recorder.validated_at == trainer.global_step:
        trainer.loggers = []
    try:
        yield
    finally:
        trainer.loggers = loggers


def available_accelerator(accelerator: str) -> str:
    """Return Lightning's name for `accelerator`; "gpu_or_cpu" means a GPU if there is one."""
    if accelerator != "gpu_or_cpu":
        return accelerator
    if not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        rank_zero_info("There is no GPU that torch can use, so the CPU is used.")
    return "auto"


def sensible_precision(accelerator: str, strategy: object = "auto") -> str:
    """Return the precision for a device: bfloat16 on a GPU that supports it.

    A GPU without bfloat16 gets "16-mixed", or "32-true" if the weights are sharded; a CPU gets
    "32-true". bfloat16 weights can learn from small updates because they are rounded
    stochastically. Sharded weights are float32, and the computation is in bfloat16.

    Args:
        accelerator: Lightning's name of the device, such as "auto", "gpu" or "cpu".
        strategy: The trainer's strategy, as an object or by Lightning's name.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        sharded = _shards_weights(strategy)
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            return "32-true" if sharded else "16-mixed"
        return "bf16-mixed" if sharded else "bf16-true"
    return "32-true"


def saves_checkpoints(callbacks: Iterable[Callback]) -> bool:
    """Return whether a callback saves checkpoints, so that Lightning must add none of its own.

    Lightning's own is added where there is no other. It would save after each epoch, and when an
    error ends the run, although a run without callbacks is said to save nothing.
    """
    return any(isinstance(one, ModelCheckpoint) for one in callbacks)


def _shards_weights(strategy: object) -> bool:
    if isinstance(strategy, str) and strategy in StrategyRegistry:
        strategy = StrategyRegistry.get(strategy)
    return isinstance(strategy, ModelParallelStrategy | FSDPStrategy)


def refuse_to_start_processes(trainer: Trainer) -> None:
    """Raise Misconfiguration if `trainer` would start this command again for other ranks.

    In a sweep, each process that is started in this way would run the whole sweep again.
    """
    if trainer.strategy.launcher is not None and trainer.world_size > 1:
        raise Misconfiguration(
            "A sweep (-m) runs on one device",
            Remedy("use Trainer(devices=1)", {"trainer.devices": "1"}),
            Remedy("start the runs one by one"),
        )


def _turn(callback: Callback) -> int:
    """Return a callback's place: four come before all others, and two after them.

    `LMEval` may take hours, so what the training has come to is recorded before. `StopOnSignal`
    comes last.
    """
    first = (AutoBatchSize, StopOnNonFinite, OpensFolder, MemoryCheck)
    places = (*((kind, place) for place, kind in enumerate(first)), (LMEval, 5), (StopOnSignal, 6))
    return next((place for kind, place in places if isinstance(callback, kind)), 4)


def _length_of_no_step(trainer: Trainer) -> str | None:
    """Return the setting with which the trainer takes no step at all; None if there is none."""
    for name in ("max_steps", "max_epochs", "limit_train_batches"):
        if getattr(trainer, name) == 0:
            return f"trainer.{name}=0"
    return None


def _rows_per_step(datamodule: InstructionDataModule, trainer: Trainer) -> int:
    """Return the rows of an optimizer step, over all micro-batches and all ranks' shares."""
    # Before the trainer is set up, `data_parallel_rank` cannot tell.
    shares = 1 if parallel_of(type(trainer.strategy)) == "tensor" else trainer.world_size
    return datamodule.batch_size * trainer.accumulate_grad_batches * shares


def _enough_validation(
    datamodule: InstructionDataModule, trainer: Trainer, rows_per_step: int
) -> int | None:
    if trainer.max_steps < 1:
        return datamodule.max_val_examples
    limits = [trainer.max_steps * rows_per_step, datamodule.max_val_examples]
    return min(limit for limit in limits if limit is not None)
