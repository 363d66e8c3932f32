"""Signals in a project that knows nothing of lit_ft."""

from __future__ import annotations

import signal

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_ft.callbacks import LastCheckpoint, StopOnSignal
from tests.support.stopping import Fault


def fit(tmp_path, *callbacks, verb="fit", saves=True):
    trainer = Trainer(
        accelerator="cpu",
        max_steps=6,
        accumulate_grad_batches=2,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        callbacks=[StopOnSignal(), *callbacks, *([LastCheckpoint(tmp_path)] if saves else [])],
        default_root_dir=tmp_path,
    )
    getattr(trainer, verb)(BoringModel())


def saved_step(tmp_path):
    return torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"]


@pytest.mark.parametrize(
    ("fault", "raised"), [("interrupt", SystemExit), ("terminate", SIGTERMException)]
)
def test_the_step_under_way_is_finished_and_saved(tmp_path, fault, raised):
    with pytest.raises(raised):
        fit(tmp_path, Fault("on_train_batch_start", 2, fault))
    assert saved_step(tmp_path) == 3


@pytest.mark.parametrize("saves", [True, False])
def test_it_does_not_promise_a_save_that_nobody_makes(tmp_path, caplog, saves):
    caplog.set_level("INFO", "lightning.pytorch")
    with pytest.raises(SystemExit):
        fit(tmp_path, Fault("on_train_batch_start", 2, "interrupt"), saves=saves)
    told = (
        "finishing the step and saving." if saves else "saving nothing, which LastCheckpoint would"
    )
    assert told in caplog.text
    assert (tmp_path / "last.ckpt").exists() == saves


@pytest.fixture
def steps_at_warning(tmp_path):
    """What is saved whenever SIGUSR2 is handled as a scheduler's job does."""
    steps = []
    earlier = signal.signal(signal.SIGUSR2, lambda *_: steps.append(saved_step(tmp_path)))
    yield steps
    signal.signal(signal.SIGUSR2, earlier)


def test_a_schedulers_warning_is_handled_once_the_step_is_saved(tmp_path, steps_at_warning):
    with pytest.raises(SIGTERMException):
        fit(tmp_path, Fault("on_train_batch_start", 2, "warn"))
    assert steps_at_warning == [3]


def test_a_second_signal_stops_at_once(tmp_path):
    twice = [Fault("on_train_batch_start", 2, "interrupt") for _ in range(2)]
    with pytest.raises(SystemExit):
        fit(tmp_path, *twice)
    assert not (tmp_path / "last.ckpt").exists()


def test_a_signal_after_the_last_step_is_not_lost(tmp_path):
    # In a callback behind StopOnSignal: nothing will ask it again.
    with pytest.raises(SystemExit):
        fit(tmp_path, Fault("on_train_end", 6, "interrupt"))


def test_sigterm_in_the_last_batch_of_a_validation_outside_fit_is_not_lost(tmp_path):
    class Validating(Fault):
        def _when_due(self, *_, **__):
            self.fault()

    with pytest.raises(SIGTERMException):
        fit(tmp_path, Validating("on_validation_batch_start", 0, "terminate"), verb="validate")
