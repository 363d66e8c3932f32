"""Faults that a test puts into a run through the configuration."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_ft.tensors.sharding import local

TRUSTED = "trusted_packages=[tests]"


def at(hook: str, step: int, *, fault: str = "interrupt") -> list[str]:
    """Return the overrides that let `fault` happen when `hook` runs after `step` steps."""
    return [
        TRUSTED,
        "+callbacks.fault._target_=tests.support.stopping.Fault",
        f"+callbacks.fault.hook={hook}",
        f"+callbacks.fault.step={step}",
        f"+callbacks.fault.fault={fault}",
    ]


class Fault(Callback):
    def __init__(self, hook: str, step: int, fault: str) -> None:
        self.step = step
        self.fault = getattr(self, fault)
        setattr(self, hook, self._when_due)

    def _when_due(self, trainer, *_, **__) -> None:
        if trainer.global_step == self.step and trainer.state.fn == "fit":
            self.step = -1
            self.fault()

    def interrupt(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    def terminate(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def hang_up(self) -> None:
        os.kill(os.getpid(), signal.SIGHUP)

    def warn(self) -> None:
        os.kill(os.getpid(), signal.SIGUSR2)

    def out_of_memory(self) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class Keyed(Callback):
    """Takes a secret, as callbacks that talk to a service do."""

    def __init__(self, api_key: str) -> None:
        self.api_key = api_key


class StopAt:
    """Ends training after a step, as an interruption between steps does."""

    def __new__(cls, step):
        class _StopAt(Callback):
            def on_train_batch_end(self, trainer, *_):
                if trainer.global_step == step:
                    trainer.should_stop = True

        return _StopAt()


def stopped(job, name, *overrides, status=130):
    with pytest.raises(SystemExit) as stop:
        job(name, *overrides)
    assert stop.value.code == status


class FailsOnOneRank(Callback):
    """Raises on one rank."""

    def __init__(self, rank: int, fault: str = "fault") -> None:
        self.rank = rank
        self.fault = fault

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == 3:
            kind = torch.OutOfMemoryError if self.fault == "out_of_memory" else RuntimeError
            raise kind("a fault of this rank alone")


class BadGradient(Callback):
    """Spoils one value in the gradient of one parameter at a step, before anything sees it."""

    def __init__(
        self, step: int, parameter: int = 0, value: float = torch.nan, rank: int = 0
    ) -> None:
        self.rank = rank
        self.step = step
        self.parameter = parameter
        self.value = value

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def spoil(parameter: Tensor) -> None:
            if (trainer.global_step, trainer.global_rank) == (self.step, self.rank):
                local(parameter.grad).view(-1)[:1] = self.value

        trained = [p for p in pl_module.parameters() if p.requires_grad]
        trained[self.parameter].register_post_accumulate_grad_hook(spoil)


def bad_gradient(step: int, parameter: int = 0, rank: int = 0) -> list[str]:
    """Return the overrides that spoil a gradient on one rank after `step` steps."""
    return [
        TRUSTED,
        "+callbacks.fault._target_=tests.support.stopping.BadGradient",
        f"+callbacks.fault.step={step}",
        f"+callbacks.fault.parameter={parameter}",
        f"+callbacks.fault.rank={rank}",
    ]
