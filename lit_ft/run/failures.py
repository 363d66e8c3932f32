"""Errors that end a run, and the settings that help against them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger

from lit_ft.callbacks import GaLore, MemoryMonitor
from lit_ft.callbacks._support.trainer import find_callback
from lit_ft.compat import remedies
from lit_ft.compat.plan import Plan
from lit_ft.compat.refusal import Remedy
from lit_ft.compat.rules import after, goes
from lit_ft.datamodule import InstructionDataModule
from lit_ft.distributed.plan import Misconfiguration, plan_of
from lit_ft.measure.memory_terms import memory_terms
from lit_ft.module import CausalLMModule
from lit_ft.run.summary import status_of


@contextmanager
def remedies_for_out_of_memory(
    module: CausalLMModule, datamodule: InstructionDataModule, trainer: Trainer
) -> Iterator[None]:
    """Add the largest term of the memory, and what needs less, to an out-of-memory error's message.

    Args:
        module: The module that is trained.
        datamodule: The data module of the run.
        trainer: The trainer of the run.

    Raises:
        torch.OutOfMemoryError: In place of the error that the device's allocator raises. The
            message names the settings.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if status_of(error) != "out_of_memory":
            raise
        settings = ", ".join(_settings_that_need_less(module, datamodule, trainer))
        raise torch.OutOfMemoryError(
            f"{error}\n{_largest_term(module, trainer)}{_snapshot(trainer)}"
            f"Settings that need less memory: {settings}."
        ) from error


def start_loggers(trainer: Trainer) -> None:
    """Start the loggers that need a login, before anything expensive.

    Args:
        trainer: The trainer of the run.

    Raises:
        Misconfiguration: If Weights & Biases takes no login. The message says how to do without.
    """
    for logger in trainer.loggers:
        if not isinstance(logger, WandbLogger):
            continue
        from wandb.errors import Error

        try:
            _ = logger.experiment
        except Error as error:
            raise Misconfiguration(
                f"Weights & Biases: {str(error).partition(' Use `wandb login`')[0].rstrip('.')}",
                Remedy("run `wandb login`"),
                Remedy("keep the run on this machine with the variable WANDB_MODE=offline"),
            ) from error


def _largest_term(module: CausalLMModule, trainer: Trainer) -> str:
    """Return a line that names the largest term of the memory; empty before there is a model."""
    if next(module.parameters(), None) is None:
        return ""
    terms = memory_terms(module, trainer.optimizers, trainer.strategy.root_device)
    (largest, size), *others = [(name, f"{n / 2**30:.3g} GiB") for name, n in terms.items()]
    rest = ", ".join(f"{name} {n}" for name, n in others)
    return f"The largest part of the memory: {largest}, {size} ({rest}).\n"


def _snapshot(trainer: Trainer) -> str:
    """Return a line that names the snapshot of the memory; empty if there is none."""
    monitor = find_callback(trainer, MemoryMonitor)
    if monitor is None or monitor.snapshot is None:
        return ""
    return f"What the memory held: {monitor.snapshot} (https://pytorch.org/memory_viz draws it).\n"


def _settings_that_need_less(
    module: CausalLMModule, datamodule: InstructionDataModule, trainer: Trainer
) -> Iterator[str]:
    if (rows := datamodule.batch_size) > 1:
        yield f"data.batch_size={rows // 2} with twice the trainer.accumulate_grad_batches"
    if not module.activation_checkpointing:
        yield "module.activation_checkpointing=true"
    yield f"data.max_length below {datamodule.max_length}"
    for choice in choices_that_need_less(plan_of(trainer, module)):
        yield " ".join(f"{name}={value}" for name, value in choice.settings.items())
    galore = find_callback(trainer, GaLore)
    if galore is not None:
        yield f"galore.rank below {galore.rank}"


def choices_that_need_less(plan: Plan) -> list[Remedy]:
    """Return the choices that need less memory than the plan's, and fit the rest of the plan."""
    choices = []
    if plan.adapter is None:
        if plan.blocks and "8bit" not in plan.optimizer:
            smaller = [remedies.optimizer(f"adamw_8bit{kind}") for kind in ("", "_torchao")]
            choices += [choice for choice in smaller if goes(after(plan, choice))][:1]
        elif plan.basis is None and not plan.layerwise and not plan.blocks:
            choices.append(Remedy("use LayerwiseUpdate()", {"update": "layerwise"}))
        if plan.basis is None or "8bit" not in plan.optimizer:
            smaller = [
                remedies.GALORE_8BIT,
                remedies.optimizer("adamw_8bit_torchao", galore="online"),
            ]
            choices += [choice for choice in smaller if goes(after(plan, choice))][:1]
        choices.append(remedies.LORA)
        if plan.basis is None and not plan.blocks:
            choices.append(Remedy("use BlockUpdate()", {"update": "blocks"}))
    elif not plan.quantised:
        choices.append(Remedy("quantise the model under the adapter", {"adapter": "qlora"}))
    return [choice for choice in choices if goes(after(plan, choice))]


@contextmanager
def remedies_for_another_run(resume: str | Path | None) -> Iterator[None]:
    """Turn torch's error for a mismatched checkpoint into one that names the difference.

    Args:
        resume: The checkpoint that the run resumes from. If it is None, errors are left unchanged.

    Raises:
        Misconfiguration: If the checkpoint has another model, adapter or set of subspaces.
    """
    try:
        yield
    except RuntimeError as error:
        told = ("in loading state_dict for", "is of another model or adapter")
        if resume is None or not any(part in str(error) for part in told):
            raise
        what = "is of another model or adapter"
        if ".basis" in str(error):
            what = "has subspaces of layers that this run trains whole"
            if "Missing key" in str(error):
                what = "has no subspaces of layers that this run trains in one"
            what += " (another optim, or other galore.targets)"
        raise not_this_run(f"resume={resume} {what}") from error


@contextmanager
def errors_of_starting_loaders() -> Iterator[None]:
    """If a data loader fails to start, raise its own error, not that of the clean-up after it."""
    try:
        yield
    except RuntimeError as error:  # from Lightning's clean-up after a loader that did not start
        first = error.__context__
        if first is None or "iter(combined_loader)" not in str(error):
            raise
        raise first from None


def not_this_run(why: str, *own: Remedy) -> Misconfiguration:
    """Return the error for a checkpoint of another run.

    Args:
        why: What differs.
        *own: Remedies for this difference alone, the closest to the request first.
    """
    return Misconfiguration(why, *own, remedies.REPEATED_ARGUMENTS, remedies.NEW_RUN)


def optimizer_name(module: CausalLMModule) -> str:
    """Return the name of the optimizer's class, which identifies the layout of its state."""
    name = getattr(getattr(module.optimizer, "func", module.optimizer), "__name__", "")
    return str(name).removeprefix("Paged")  # paged optimizers keep the same state
