"""PruneTrial: what it reports to a trial, and how a pruned run ends."""

from __future__ import annotations

import lightning as L
import optuna
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from lit_ft.callbacks import PruneTrial

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Model(BoringModel):
    """A model of another project, whose losses at its validations are given."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__()
        self.losses = iter(losses)

    def on_validation_epoch_end(self) -> None:
        self.log("loss_on_val", torch.tensor(next(self.losses)))


def fit(trial: optuna.Trial, losses: list[float]) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=8,
        val_check_interval=2,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        callbacks=[PruneTrial(trial, monitor="loss_on_val")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Model(losses))
    return trainer


@pytest.fixture
def study() -> optuna.Study:
    return optuna.create_study(pruner=optuna.pruners.SuccessiveHalvingPruner(1, 2))


def test_it_reports_each_validation(study):
    trial = study.ask()
    assert fit(trial, [4.0, 3.0, 2.0, 1.0]).global_step == 8
    assert study.trials[0].intermediate_values == {1: 4.0, 2: 3.0, 3: 2.0, 4: 1.0}


def test_a_worse_trial_ends_after_as_many_validations(study):
    study.tell(study.ask(), 1.0)
    fit(study.ask(), [4.0, 3.0, 2.0, 1.0])
    with pytest.raises(optuna.TrialPruned, match="at step 4"):
        fit(study.ask(), [3.5, 3.25, 0.0, 0.0])
    assert study.trials[2].intermediate_values == {1: 3.5, 2: 3.25}


def test_the_last_validation_ends_nothing(study):
    fit(study.ask(), [4.0, 3.0, 2.0, 1.0])
    assert fit(study.ask(), [3.0, 2.0, 1.0, 5.0]).global_step == 8


def test_what_is_not_finite_is_not_reported(study):
    trial = study.ask()
    fit(trial, [float("nan"), 3.0, float("inf"), 1.0])
    assert study.trials[0].intermediate_values == {2: 3.0, 4: 1.0}
