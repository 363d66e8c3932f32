"""Why a run ended stands in its summary, in its log and in the box at the end."""

import logging

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_ft.callbacks.stop import SIGHUPException
from lit_ft.run.recorder import Recorder
from lit_ft.run.summary import RunSummary, read_summary
from tests.support.running import LORA
from tests.support.stopping import StopAt, at, stopped
from tests.support.tiny_module import quiet_trainer


class Falls(BoringModel):
    """A validation loss that is the given one at each step."""

    def __init__(self, losses):
        super().__init__()
        self.losses = losses

    def on_validation_epoch_end(self):
        self.log("val_loss", torch.tensor(self.losses[self.global_step]))


def ended(folder, *callbacks, losses=(9.0,) * 99, resume=None, **options):
    summary = RunSummary(folder, {})
    trainer = quiet_trainer(
        limit_val_batches=1,
        val_check_interval=1,
        default_root_dir=folder,
        callbacks=[*callbacks, Recorder(summary, "SGD", [])],
        **{"limit_train_batches": 10, **options},
    )
    trainer.fit(Falls(losses), ckpt_path=resume)
    trainer.save_checkpoint(folder / "last.ckpt")
    return summary.fields["ended"]


@pytest.mark.parametrize(
    ("options", "callbacks", "told"),
    [
        ({"max_steps": 2}, [], "max_steps=2 reached"),
        ({"max_epochs": 2}, [], "max_epochs=2 reached at step 20"),
        ({"max_epochs": 2, "max_steps": 10}, [], "max_steps=10 reached"),
        (
            {"max_time": {"seconds": 0}},
            [],
            "no step was taken: max_time reached after 0:00:00, at step 0",
        ),
        (
            {"limit_train_batches": 0, "max_steps": 2},
            [],
            "no step was taken: limit_train_batches=0 reached",
        ),
        ({"max_steps": 9}, [StopAt(3)], "a callback stopped the training at step 3"),
    ],
)
def test_a_run_says_why_it_ended(tmp_path, options, callbacks, told):
    assert ended(tmp_path, *callbacks, **options) == told


def stopper(**options):
    return EarlyStopping("val_loss", check_on_train_epoch_end=False, **options)


LOSSES = [9.0, 5.0, 4.25, 4.5, 4.5, 4.25, 1.0, 1.0]
STOPPED = "early stopping: val_loss did not improve for 3 validations, best 4.25 at step 2"


def test_early_stopping_says_what_did_not_improve_and_when_it_was_best(tmp_path):
    assert ended(tmp_path, stopper(), losses=LOSSES, max_steps=9) == STOPPED


def test_the_best_step_is_remembered_by_a_resumed_run(tmp_path):
    first = ended(tmp_path, stopper(), losses=LOSSES, max_steps=3)
    assert first == "max_steps=3 reached"
    second = {"losses": LOSSES, "max_steps": 9, "resume": tmp_path / "last.ckpt"}
    assert ended(tmp_path, stopper(), **second) == STOPPED


def test_other_reasons_of_early_stopping_are_told_in_its_own_words(tmp_path):
    stopping = stopper(stopping_threshold=4.6)
    told = ended(tmp_path, stopping, losses=LOSSES, max_steps=9)
    assert told == "early stopping: Stopping threshold reached: val_loss = 4.25 < 4.6."
    told = ended(tmp_path, stopper(), losses=[9.0, 5.0, torch.nan], max_steps=9)
    assert told.startswith("early stopping: Monitored metric val_loss = nan is not finite")


def test_a_signal_after_the_training_leaves_why_that_ended(tmp_path):
    with pytest.raises(SIGTERMException), RunSummary(tmp_path, {}) as summary:
        summary.update(steps=4, ended="max_steps=4 reached")
        raise SIGTERMException
    assert read_summary(tmp_path)["ended"] == "max_steps=4 reached, then SIGTERM"


@pytest.mark.parametrize(
    ("error", "steps", "told"),
    [
        (SIGTERMException(), 2, "SIGTERM at step 2"),
        (SIGHUPException(), 2, "SIGHUP at step 2"),
        (KeyboardInterrupt(), 2, "Ctrl-C at step 2"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "out of memory at step 1"),
        (
            FloatingPointError("The loss is nan.\nMore."),
            3,
            "FloatingPointError at step 3: The loss is nan",
        ),
        (ValueError("no"), 0, "ValueError before the first step: no"),
    ],
)
def test_an_error_or_a_signal_is_named_with_its_step(tmp_path, error, steps, told, caplog):
    caplog.set_level(logging.INFO, logger="lit_ft.run.summary")
    with pytest.raises(type(error)), RunSummary(tmp_path, {}) as summary:
        summary.update(steps=steps)
        assert read_summary(tmp_path)["ended"] is None  # a run that is killed does not know
        raise error
    assert read_summary(tmp_path)["ended"] == told
    assert caplog.messages[-1] == f"Ended: {told}."


def test_a_job_says_it_in_its_log_and_in_the_box(job, caplog, capsys):
    caplog.set_level(logging.INFO, logger="lit_ft.run.summary")
    assert job("run", *LORA, "trainer.max_steps=1")["ended"] == "max_steps=1 reached"
    assert caplog.messages[-1] == "Ended: max_steps=1 reached."
    assert "max_steps=1 reached" in capsys.readouterr().out
    again = job("run", *LORA, "trainer.max_steps=1", "resume=auto")
    assert again["ended"] == "max_steps=1 reached"  # no step is left


def test_a_validation_alone_says_that_it_was_one(job):
    assert job("run", "validate_only=true")["ended"] == "validation only, nothing was trained"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "status", "by"), [("interrupt", 130, "Ctrl-C"), ("terminate", 143, "SIGTERM")]
)
def test_a_job_that_a_signal_stops_names_the_signal(job, tmp_path, fault, status, by):
    stopped(job, "run", *LORA, *at("on_before_backward", 1, fault=fault), status=status)
    assert read_summary(tmp_path / "run")["ended"] == f"{by} at step 2"
